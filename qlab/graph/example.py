"""The example a model is captured with: how the model is called on it, and what is done to it before."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.errors import CaptureError


def example_arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with which `model` is called on `example`, which may be a labelled batch."""
    parameters = positional_parameters(model)
    if isinstance(example, Mapping):
        accepted = {p.name for p in inspect.signature(model.forward).parameters.values()}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
        if takes_any or accepted & set(example):
            return (), {k: v for k, v in example.items() if (takes_any or k in accepted) and k != "labels"}
        return (dict(example),), {}
    if isinstance(example, (list, tuple)):
        most = len(parameters) if parameters is not None else len(example)
        required = sum(p.default is p.empty for p in parameters) if parameters is not None else len(example)
        taken = len(example) if len(example) <= required else max(required, 1)
        if parameters is not None and most > required and len(example) > required:
            # Optional parameters are filled only where every further entry is an input, not a label.
            rest = example[required:most]
            if len(example) <= most and not any(_is_label(value) for value in rest):
                taken = len(example)
        return tuple(example[:taken]), {}
    return (example,), {}


def positional_parameters(model: nn.Module) -> list[inspect.Parameter] | None:
    """The parameters of `forward` that can be given by position; None where it takes any number."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def check_example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises CaptureError for an example without a tensor, without a sample, or without data."""
    tensors = tensors_of((args, kwargs))
    given = ", ".join(type(value).__name__ for value in pytree.tree_leaves((args, kwargs))) or "nothing"
    if not any(tensor.dim() for tensor in tensors):
        raise CaptureError(
            f"the example holds no tensor with a batch axis (it holds {given}). Pass one batch as the model takes it; "
            "torch.as_tensor(value) makes a tensor of a NumPy array."
        )
    if any(tensor.is_meta for tensor in tensors):
        raise CaptureError("the example is on the meta device, which holds no data. Pass a batch of real data.")
    empty = next((tensor for tensor in tensors if tensor.dim() and not tensor.shape[0]), None)
    if empty is not None:
        raise CaptureError(f"the example has no sample: a tensor of shape {list(empty.shape)}. Pass at least one.")


def on_device_of(model: nn.Module, tree: Any) -> Any:
    """`tree` with its tensors where the model's parameters and buffers are, unless those are on several devices."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return tree
    device = devices.pop()
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, tree)


def at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with a batch of 1 repeated to 2: export treats a size of 1 as a constant."""
    tensors = [tensor for tensor in tensors_of((args, kwargs)) if tensor.dim()]
    if not tensors or tensors[0].shape[0] != 1:
        return args, kwargs
    return pytree.tree_map(
        lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() and v.shape[0] == 1 else v, (args, kwargs)
    )


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a tree of arguments or results."""
    return [value for value in pytree.tree_leaves(tree) if isinstance(value, Tensor)]


def cloned(tree: Any) -> Any:
    """`tree` with copies of its tensors, so that in-place writes do no harm."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def _is_label(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dim() <= 1
