"""Tracing: the call of torch.export, with the batch axis free, and what its errors mean in the user's words."""

import contextlib
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.errors import CaptureError
from qlab.graph.admission import without_fused_attention
from qlab.graph.example import tensors_of

_NOT_USERS = (
    str(Path(torch.__file__).parent),
    *(str(Path(__file__).parent.parent / room) for room in ("graph", "sim")),
)


def exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Sequence[int]
) -> torch.export.ExportedProgram:
    """The model as torch.export reads it; raises CaptureError with the user's file, line and what to do."""
    first: Exception | None = None
    for batch_axis in (torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO):
        # AUTO: a tensor may have its batch on another axis, or the batch's size by chance.
        try:
            program = _traced(model, args, kwargs, dynamic_shapes(model, args, kwargs, dynamic, batch_axis))
        except Exception as error:
            first = first or error
            if cause_of(error) != "size":
                raise CaptureError(_explain(model, first)) from error
        else:
            if first is None or _has_free_axis(program):
                return program
    assert first is not None
    raise CaptureError(_explain(model, first)) from first


def dynamic_shapes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: Sequence[int] = (),
    batch_axis: Any = torch.export.Dim.DYNAMIC,
) -> dict[str, Any]:
    """For each parameter of `forward` which axes are free: the first where its size is the batch's, and `dynamic`."""
    batch = next(tensor.shape[0] for tensor in tensors_of((args, kwargs)) if tensor.dim())

    def shape(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        axes = {0: batch_axis} if value.dim() and value.shape[0] == batch else {}
        return axes | {axis: torch.export.Dim.DYNAMIC for axis in dynamic if 0 < axis < value.dim()}

    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(shape, value) for name, value in given.items()}


def size_of(dimension: Any) -> int | None:
    """The size of one axis of a traced tensor, None where it is free."""
    return dimension if isinstance(dimension, int) else dimension.node.maybe_as_int()


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Export logs what it raises and prints the graph so far; the error says it once, in the user's words."""
    loggers = [logging.getLogger(name) for name in ("torch.fx", "torch.export", "torch._dynamo")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> torch.export.ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad(), without_fused_attention(), quiet_logs():
        warnings.simplefilter("ignore")
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def place_of(error: BaseException) -> tuple[str, str]:
    """('file:line', the code there) of the innermost frame of the user's own code; two empty strings if there is none.

    Frames of libraries count only where there is no other.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename) and f.line]
    own = [f for f in frames if "/site-packages/" not in f.filename] or frames
    return (f"{own[-1].filename}:{own[-1].lineno}", (own[-1].line or "").strip()) if own else ("", "")


def is_users(file: str) -> bool:
    """Whether a file is neither torch's nor one of those that capture and simulate."""
    return not file.startswith(_NOT_USERS) and not file.startswith("<")


def cause_of(error: BaseException) -> str:
    """Why export failed: 'branch' on data, a 'size' that was declared free is fixed, or 'other'."""
    name, text = type(error).__name__, str(error).lower()
    if "DataDependent" in name or "data-dependent" in text or "unbacked" in text:
        return "branch"
    return "size" if "ConstraintViolation" in name or "constraint" in text or "specialized" in text else "other"


def _has_free_axis(program: torch.export.ExportedProgram) -> bool:
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    return any(size_of(d) is None for value in values if isinstance(value, Tensor) for d in value.shape)


def _explain(model: nn.Module, error: Exception) -> str:
    """What went wrong in the user's words: file, line, cause and what to do."""
    place, code = place_of(error)
    where = f" at {place} ({code})" if place else ""
    text = str(error)
    if not where and (match := re.search(r'File "([^"]+)", line (\d+), in (\w+)', text)):
        where = f" at {match[1]}:{match[2]}"
    name = type(error).__name__
    cause, advice = {
        "branch": (
            "the code branches on the values of a tensor",
            "Replace the branch by torch.where or torch.cond, or move it out of forward. ",
        ),
        "size": (
            "the code fixes a size that must stay free (the batch size, or an axis in `dynamic`)",
            "Use x.shape[0] and -1 in view and reshape instead of numbers. A batch on another axis than the first is "
            "named by dynamic=(1,). ",
        ),
        "other": ("torch.export cannot follow the code", ""),
    }[cause_of(error)]
    first = next((line for line in text.splitlines() if line.strip()), name)
    return (
        f"{type(model).__name__} cannot be captured{where}: {cause}. {advice}"
        f"qlab.validate(model, example) lists every such place. [{name}: {first.strip()[:300]}]"
    )
