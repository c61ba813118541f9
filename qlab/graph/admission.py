"""What is asked of a model before it is captured: it is a module with its code and its weights, and it runs.

Wrappers are taken off, the model is copied, called once as the user calls it, and given a forward that export can read
where the original one collects keyword arguments or returns objects of a class of its own.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from qlab.errors import CaptureError
from qlab.graph.example import cloned
from qlab.mapped import mapped_twins

# Wrappers by class name, so that torch.distributed need not be imported, to the attribute with the user's model.
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def unwrapped(model: Any) -> nn.Module:
    """The user's own module, without DataParallel, DistributedDataParallel or torch.compile around it.

    Raises CaptureError for what has no Python code (TorchScript), no whole weights (FSDP), or is no module at all.
    """
    while type(model).__name__ in _WRAPPERS and isinstance(model, nn.Module):
        model = getattr(model, _WRAPPERS[type(model).__name__])
    name = type(model).__name__
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise CaptureError(
            f"expected a torch.nn.Module in Python; got {name}, compiled TorchScript. Pass the module that it was "
            "scripted or traced from."
        )
    if isinstance(model, torch.export.ExportedProgram):
        raise CaptureError("expected a torch.nn.Module; got an ExportedProgram. Pass the module that was exported.")
    if name == "FullyShardedDataParallel":
        raise CaptureError(
            "the model is wrapped in FullyShardedDataParallel, so its weights are in pieces. Load its full state dict "
            "into the plain module and pass that."
        )
    if not isinstance(model, nn.Module):
        hint = " Pass an instance, not the class." if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise CaptureError(f"expected a torch.nn.Module; got {name}.{hint}")
    return model


def admitted(model: Any) -> nn.Module:
    """A deep copy of the user's module in eval mode, whose activations do not overwrite their inputs."""
    model = unwrapped(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise CaptureError(
            f"{lazy[0]!r} has no shape yet: the model has lazy modules that saw no data. Run model(example) once, "
            "then its weights exist and can be quantized."
        )
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise CaptureError(f"{empty[0]!r} is on the meta device, which holds no data. Load the model's weights first.")
    try:
        own = copy.deepcopy(model, mapped_twins(model)).eval()
    except Exception as error:
        raise CaptureError(f"the model cannot be deep-copied ({error}); qlab works on a copy only.") from error
    for module in own.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    for parameter in own.parameters():
        parameter.grad = None
    return own


def result_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's own result on the example; an error of the model stays its own, with a note how it was called."""
    try:
        with torch.no_grad(), without_fused_attention():
            return model(*cloned(args), **cloned(kwargs))
    except Exception as error:
        given = [*map(_described, args), *(f"{key}={_described(value)}" for key, value in kwargs.items())]
        error.add_note(
            f"The model itself raised this when qlab called it, in eval mode, on the example: "
            f"{type(model).__name__}({', '.join(given)}). Give the example as the model takes it."
        )
        raise


@contextlib.contextmanager
def without_fused_attention() -> Iterator[None]:
    """nn.MultiheadAttention takes a fused kernel in inference; its last bits differ from the code export reads."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def register_results(result: Any) -> None:
    """Lets dataclasses among the results pass through export, as dicts and tuples do."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        if type(result) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(result))
        for field in dataclasses.fields(result):
            register_results(getattr(result, field.name))
    elif isinstance(result, Mapping):
        for value in result.values():
            register_results(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            register_results(value)


def unreadable(result: Any) -> tuple[str, ...]:
    """The classes among the results that export cannot read: what they hold is left out, None in their place."""
    return tuple(dict.fromkeys(type(v).__name__ for v in pytree.tree_leaves(result) if not _is_readable(v)))


def readable(result: Any) -> Any:
    """`result` with None where an object stands that export cannot read, such as a cache of keys and values."""
    return pytree.tree_map(lambda v: v if _is_readable(v) else None, result)


@contextlib.contextmanager
def readable_forward(model: nn.Module, kwargs: dict[str, Any], result: Any) -> Iterator[None]:
    """Within the context the model's forward names every keyword argument and returns only what export can read."""
    forward = model.forward
    signature = inspect.signature(forward)
    collector = next((p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    collected = [key for key in kwargs if key not in signature.parameters]
    if not unreadable(result) and not (collector and collected):
        yield
        return

    @functools.wraps(forward)
    def adapted(*args: Any, **kw: Any) -> Any:
        return readable(forward(*args, **kw))

    named = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY) for key in collected]
    kept = [p for p in signature.parameters.values() if p is not collector]
    adapted.__signature__ = signature.replace(parameters=[*kept, *named])  # type: ignore[attr-defined]
    model.forward = adapted
    try:
        yield
    finally:
        del model.forward


def _is_readable(value: Any) -> bool:
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple, dict)):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)[:40]
