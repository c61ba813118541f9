"""What one run of a model shows and its graph does not: dropout frozen by eval mode, writes to inputs and buffers."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlab.graph.admission import without_fused_attention
from qlab.graph.example import cloned, tensors_of
from qlab.graph.tracing import is_users

_WRAPPING = ("overrides.py", "functional.py")  # torch's files between a call of F.dropout and the mode that sees it


@dataclass(frozen=True)
class Observed:
    """inputs: the numbers (in order of tensors) of inputs that were written to. buffers: names of those written to.

    dropouts: (function, probability, 'file:line') of each dropout that is called as a function and off in eval mode.
    """

    inputs: tuple[int, ...]
    buffers: tuple[str, ...]
    dropouts: tuple[tuple[str, float, str], ...]


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observed:
    """Run `model` (a copy in eval mode) once on the arguments and watch; the arguments themselves are not touched."""
    args, kwargs = cloned(args), cloned(kwargs)
    inputs, buffers = tensors_of((args, kwargs)), dict(model.named_buffers())
    before = [tensor._version for tensor in (*inputs, *buffers.values())]
    spy = _DropoutSpy()
    with torch.no_grad(), without_fused_attention(), spy:
        model(*args, **kwargs)
    after = [tensor._version for tensor in (*inputs, *buffers.values())]
    written = [old != new for old, new in zip(before, after, strict=True)]
    named = [name for name, changed in zip(buffers, written[len(inputs) :], strict=True) if changed]
    named += [name for name, tensor in model.named_buffers() if tensor is not buffers.get(name)]
    return Observed(
        tuple(number for number in range(len(inputs)) if written[number]), tuple(named), tuple(dict.fromkeys(spy.found))
    )


@dataclass
class _DropoutSpy(TorchFunctionMode):
    """Notes every dropout that the user's own code calls with training=False."""

    found: list[tuple[str, float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            probability = given.get("p", given.get("dropout_p", 0.5))
            place = _caller()
            if place and not isinstance(probability, Tensor) and probability > 0 and given.get("training") is False:
                self.found.append((name, float(probability), place))
        return func(*args, **kwargs)


def _caller() -> str:
    """'file:line' of the user's code that called the function, '' where a module of torch did."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if is_users(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
        if Path(frame.filename).name not in _WRAPPING:
            return ""
    return ""
