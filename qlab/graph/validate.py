"""What can be said of a model before anything is quantized: whether it can be captured, and how it is written.

Each rule is a function that yields Notes. `model_rules` look at the model, its example and one run of it; `graph_rules`
at the captured graph. Rules that need presets and placement are in qlab/sim/validate.py.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.errors import CaptureError
from qlab.graph.admission import admitted, register_results, result_of, unreadable, unwrapped
from qlab.graph.capture import capture
from qlab.graph.example import check_example, example_arguments, on_device_of, tensors_of
from qlab.graph.failures import Failure, export_failures
from qlab.graph.failures import rules as failure_rules
from qlab.graph.findings import Finding, Note, Rules, Severity
from qlab.graph.layer_graph import WEIGHT_POSITION, Layer, LayerGraph
from qlab.graph.observed import Observed, observe
from qlab.graph.origins import Source, origins
from qlab.graph.tracing import place_of
from qlab.graph.weight_views import viewed_weight

model_rules, graph_rules = Rules(), Rules()


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


def check_model(model: nn.Module, example: Any, dynamic: Sequence[int]) -> tuple[list[Finding], LayerGraph | None]:
    """What stands in the way of capture and how the model is written; the captured graph where there is one."""
    try:
        own = admitted(model)
    except CaptureError as error:
        return failure_rules.apply([Failure("model", str(error))]), None
    try:
        args, kwargs = example_arguments(own, example)
        check_example(args, kwargs)
    except CaptureError as error:
        return failure_rules.apply([Failure("example", str(error))]), None
    moved = on_device_of(own, (args, kwargs))
    try:
        result = result_of(own, *moved)
    except Exception as error:  # noqa: BLE001  the model's own error is what the person is shown
        return failure_rules.apply([Failure("forward", f"{type(error).__name__}: {error}", *place_of(error))]), None
    register_results(result)
    findings = model_rules.apply(Subject(model, unwrapped(model), args, kwargs, result, observe(own, *moved)))
    if any(finding.severity is Severity.ERROR and finding.code == "QL111" for finding in findings):
        return findings, None
    try:
        graph = capture(model, example, dynamic)
    except CaptureError as error:
        return findings + failure_rules.apply(export_failures(model, example, dynamic, error)), None
    return findings + graph_rules.apply(graph), graph


# The model, its example, and one run ----------------------------------------------------------------------------------


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
    "QL203",
    Severity.WARNING,
    "Dropout as a function is frozen",
    "The graph is captured in eval mode, where this dropout does nothing: it stays off in quantization-aware training.",
    "Make it a module: self.dropout = nn.Dropout(p) in the constructor, self.dropout(x) in forward.",
)
def frozen_dropout(subject: Subject) -> Iterator[Note]:
    """F.dropout(x, p, training=self.training) and its kin."""
    for function, probability, location in subject.observed.dropouts:
        yield Note(f"{function} with p={probability:g} is a function", location=location)


@model_rules.rule(
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


@model_rules.rule(
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


@model_rules.rule(
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


# The captured graph ---------------------------------------------------------------------------------------------------


@graph_rules.rule(
    "QL201",
    Severity.HINT,
    "A module is called more than once",
    "Each call has its own output grid, but one weight: folding, equalization and bias correction leave it alone.",
    "qlab.prepare(model, example) makes one module of each call (weights stay shared). Or write one module a call.",
)
def reused_module(graph: LayerGraph) -> Iterator[Note]:
    """One module in several layers: a warning where it has weights."""
    calls: dict[str, list[Layer]] = defaultdict(list)
    for layer in graph:
        if layer.module is not None and layer.path is not None:
            calls[layer.path].append(layer)
    for path, layers in calls.items():
        if len(layers) > 1:
            severity = Severity.WARNING if layers[0].parameters else None
            yield Note(f"{path!r} is called {len(layers)} times", path, layers[1].location, severity=severity)


@graph_rules.rule(
    "QL207",
    Severity.WARNING,
    "A weight is computed in forward",
    "What is quantized is the computed value, on the grid of an activation; techniques that round weights pass it by.",
    "Make it a plain weight: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), or for the old form "
    "torch.nn.utils.remove_weight_norm(module).",
)
def computed_weight(graph: LayerGraph) -> Iterator[Note]:
    """Weight norm, spectral norm, or arithmetic on a parameter before it is used as a weight."""
    known = origins(graph)
    for layer in graph:
        position = WEIGHT_POSITION.get(layer.function_name)
        if (
            position is None
            or layer.weight_source is not None
            or viewed_weight(layer)
            or len(layer.args) <= position[0]
        ):
            continue
        operand = layer.args[position[0]]
        if isinstance(operand, Layer) and operand.is_float and known[operand.name].source is Source.CONSTANT:
            yield Note(f"the weight of {layer.name!r} is computed by {operand.title}", layer.name, layer.location)
