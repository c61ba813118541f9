"""Rules that look at a model, its example and one run of it: how the model is called, and how it is written.

Each rule is a function that yields Notes; docs/validator.md has a section on each.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.graph.admission import unreadable
from qlab.graph.example import tensors_of
from qlab.graph.findings import Note, Rules, Severity
from qlab.graph.observed import Observed
from qlab.graph.tracing import is_users

rules = Rules()


@dataclass(frozen=True)
class Subject:
    """What model rules look at: the model as given and without wrappers, its arguments as given, and one run of it."""

    given: nn.Module
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    observed: Observed

    @property
    def inputs(self) -> dict[str, Any]:
        """The leaves of the arguments by name, such as 'x' or "batch['mask']"."""
        given = inspect.signature(self.model.forward).bind(*self.args, **self.kwargs).arguments
        leaves, _ = pytree.tree_flatten_with_path(dict(given))
        return {f"{path[0].key}{pytree.keystr(path[1:])}": value for path, value in leaves}

    @property
    def forward(self) -> str:
        """'file:line' of the model's forward, '' where it is torch's own or has no source."""
        try:
            file, line = (
                inspect.getsourcefile(type(self.model).forward),
                inspect.getsourcelines(type(self.model).forward)[1],
            )
        except (OSError, TypeError):  # typed into a console, or generated
            return ""
        return f"{file}:{line}" if file and is_users(file) else ""


@rules.rule(
    "QL109",
    Severity.HINT,
    "The example is a batch of one",
    "Export takes a size of 1 for a constant, so the example is repeated; statistics over one sample say little.",
    "Give two or more samples, and calibrate on some dozens.",
)
def batch_of_one(subject: Subject) -> Iterator[Note]:
    """The first axis of the first tensor is 1."""
    first = next(tensor for tensor in tensors_of((subject.args, subject.kwargs)) if tensor.dim())
    if first.shape[0] == 1:
        yield Note(f"the example has shape {list(first.shape)}: one sample")


@rules.rule(
    "QL110",
    Severity.WARNING,
    "An input is not a tensor",
    "The graph is that of the example: a number, flag or None among the inputs is part of it and cannot change.",
    "Make it a tensor if it changes; otherwise set it in the constructor. Capture once for each value that matters.",
)
def input_is_no_tensor(subject: Subject) -> Iterator[Note]:
    """Numbers, strings, flags and None given to forward."""
    for name, value in subject.inputs.items():
        if not isinstance(value, Tensor):
            yield Note(f"input {name!r} stays {value!r}", layer=name)


@rules.rule(
    "QL111",
    Severity.WARNING,
    "A result cannot be captured",
    "Objects of a class that PyTorch does not know as a container hide their tensors; None stands in their place.",
    "Return tensors, tuples, lists, dicts or dataclasses. A cache of keys and values: model.config.use_cache = False.",
)
def result_is_left_out(subject: Subject) -> Iterator[Note]:
    """Objects among the results; an error where nothing else is returned."""
    severity = None if tensors_of(subject.result) else Severity.ERROR
    for name in unreadable(subject.result):
        yield Note(f"forward returns a {name}", severity=severity)


@rules.rule(
    "QL112",
    Severity.WARNING,
    "Forward writes to its input",
    "What the caller handed in is changed, so a second run on the same batch sees other data. The captured graph "
    "leaves its inputs alone.",
    "Write x = x + 1 instead of x += 1 or x.add_(1), and inplace=False in a first activation.",
)
def writes_to_input(subject: Subject) -> Iterator[Note]:
    """An in-place operation on a tensor among the arguments."""
    names = [name for name, value in subject.inputs.items() if isinstance(value, Tensor)]
    for number in subject.observed.inputs:
        yield Note(f"input {names[number]!r} is overwritten", layer=names[number])


@rules.rule(
    "QL113",
    Severity.WARNING,
    "Forward writes to a buffer in eval mode",
    "The result depends on what was run before, so float and quantized runs cannot be compared.",
    "Update state in training only (if self.training), or pass it in and return it.",
)
def writes_to_buffer(subject: Subject) -> Iterator[Note]:
    """A counter, cache or running mean that changes in eval mode."""
    for name in subject.observed.buffers:
        yield Note(f"buffer {name!r} changes")


@rules.rule(
    "QL114",
    Severity.HINT,
    "The model is wrapped",
    "A wrapper is no part of what runs on target; layers have the names of the module inside.",
    "Nothing to do. model.module (DataParallel, DistributedDataParallel) and model._orig_mod (torch.compile) are it.",
)
def wrapped(subject: Subject) -> Iterator[Note]:
    """DataParallel, DistributedDataParallel, torch.compile."""
    if subject.given is not subject.model:
        yield Note(f"{type(subject.given).__name__} around {type(subject.model).__name__} was taken off")


@rules.rule(
    "QL115",
    Severity.HINT,
    "The example is on another device than the model",
    "Batches are moved to the model at each step, which costs time on every one.",
    "Move the data where the model is: batch.to(device), or pin_memory in the loader.",
)
def other_device(subject: Subject) -> Iterator[Note]:
    """Example and parameters on different devices."""
    devices = {tensor.device for tensor in (*subject.model.parameters(), *subject.model.buffers())}
    found = {tensor.device for tensor in tensors_of((subject.args, subject.kwargs))}
    if len(devices) == 1 and found - devices:
        yield Note(f"the model is on {devices.pop()}, the example on {', '.join(map(str, found))}")


@rules.rule(
    "QL202",
    Severity.HINT,
    "Tied weights",
    "One tensor in two layers has one grid; techniques that change a weight for one layer's sake leave it alone.",
    "Nothing, if the tie is meant. To treat the layers apart, untie them: head.weight = nn.Parameter(weight.clone()).",
)
def tied_weights(subject: Subject) -> Iterator[Note]:
    """One parameter under several names."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in subject.model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for tied in names.values():
        if len(tied) > 1:
            yield Note(f"{' and '.join(map(repr, tied))} are one parameter", layer=tied[0].rpartition(".")[0] or None)


@rules.rule(
    "QL203",
    Severity.WARNING,
    "Dropout as a function is frozen",
    "The graph is captured in eval mode, where this dropout does nothing: it stays off in quantization-aware training.",
    "Make it a module: self.dropout = nn.Dropout(p) in the constructor, self.dropout(x) in forward; "
    "qlab.prepare(model, example) does so.",
)
def frozen_dropout(subject: Subject) -> Iterator[Note]:
    """F.dropout(x, p, training=self.training) and its kin; dropout inside attention and recurrent layers."""
    for function, probability, location in subject.observed.dropouts:
        yield Note(f"{function} with p={probability:g} is a function", location=location)
    for name, module in subject.model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0:
            told = f"the dropout of {module.dropout:g} inside {name!r} ({type(module).__name__}) is frozen"
            yield Note(
                told, name or None, remedy="Nothing mends it inside torch's own layer; put an nn.Dropout after it."
            )


@rules.rule(
    "QL204",
    Severity.HINT,
    "Code asks for self.training",
    "The graph is captured in eval mode and keeps that path, also in quantization-aware training.",
    "Nothing, if training is not planned. Otherwise put what differs into a module of torch.nn (Dropout, BatchNorm).",
)
def reads_training(subject: Subject) -> Iterator[Note]:
    """`self.training` in the forward of a module that is not torch's."""
    known = {location for _, _, location in subject.observed.dropouts}
    for kind in dict.fromkeys(type(module) for module in subject.model.modules()):
        if kind.__module__.startswith("torch."):
            continue
        try:
            lines, first = inspect.getsourcelines(kind.forward)
        except (OSError, TypeError):  # no source: typed into a console, or generated
            continue
        for number, line in enumerate(lines, first):
            location = f"{inspect.getsourcefile(kind.forward)}:{number}"
            if "self.training" in line.partition("#")[0] and location not in known:
                yield Note(f"{kind.__name__}: {line.strip()}", location=location)


@rules.rule(
    "QL205",
    Severity.ERROR,
    "Weights are NaN or infinite",
    "A grid spans the range of a tensor; with NaN or infinity there is none.",
    "Find what broke the checkpoint or the training; a layer that is never used can be deleted.",
)
def not_finite(subject: Subject) -> Iterator[Note]:
    """NaN or infinity in parameters; NaN or +infinity in buffers, where -infinity may be a mask."""
    for name, tensor in (*subject.model.named_parameters(), *subject.model.named_buffers()):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        bad = ~tensor.detach().isfinite()
        if not isinstance(tensor, nn.Parameter):
            bad &= ~tensor.detach().isneginf()
        if count := int(bad.sum()):
            yield Note(f"{count} of {tensor.numel()} values of {name!r}", layer=name.rpartition(".")[0] or None)


@rules.rule(
    "QL206",
    Severity.WARNING,
    "Parameters are not float32",
    "Ranges, scales and comparisons are those of float32; in half precision its rounding hides that of the grid.",
    "Convert before quantizing: model.float().",
)
def other_precision(subject: Subject) -> Iterator[Note]:
    """Half, bfloat16, double or complex parameters."""
    found: dict[torch.dtype, list[str]] = defaultdict(list)
    for name, parameter in subject.model.named_parameters():
        if parameter.dtype is not torch.float32:
            found[parameter.dtype].append(name)
    for dtype, names in found.items():
        word = str(dtype).removeprefix("torch.")
        yield Note(
            f"{len(names)} parameters are {word}, such as {names[0]!r}", layer=names[0].rpartition(".")[0] or None
        )
