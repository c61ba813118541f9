"""Where values come from: from the model's activations, from integers and masks, or from constants alone.

Rotary tables, time embeddings and attention masks are computed in forward like everything else, but a grid of eight
bits is wrong for them: a compiler folds what depends on constants alone, numbers made from integers are exact, and a
mask is no value. Placement asks here which is which.
"""

import enum
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.graph.kinds import SAME_GRID
from qlab.graph.layer_graph import Layer, LayerGraph

MASKING = -1e4
"""Numbers as negative as this are written to make softmax ignore a place; half precision masks use it, too."""

_FILLS = frozenset({"full", "full_like", "new_full", "fill", "mask", "zero_pad"})
_PASSES_MASK = _FILLS | (SAME_GRID - {"max_pool", "max"}) | {"add", "sub", "rsub", "mul", "div", "triu", "tril"}


class Source(enum.Enum):
    """What the value of a layer depends on, the strongest first."""

    ACTIVATION = "activation"  # a float input, or anything a weight has been applied to
    INTEGER = "integer"  # integer or boolean values: tokens, positions, time steps, masks
    CONSTANT = "constant"  # parameters, buffers and numbers written in the code


@dataclass(frozen=True)
class Origin:
    """What is known of the value of one layer.

    flag: made from booleans, so 0 or 1. mask: it makes softmax ignore places: hugely negative there, 0 elsewhere or
    whatever an activation is. folds: its users, too, compute from constants and integers alone, so that only their
    result meets an activation.
    """

    source: Source
    flag: bool = False
    mask: bool = False
    folds: bool = False


def origins(graph: LayerGraph) -> dict[str, Origin]:
    """The origin of every layer, by name."""
    found: dict[str, Origin] = {}
    for layer in graph:
        found[layer.name] = _origin(layer, [found[source.name] for source in layer.inputs])
    results = {id(output) for output in graph.outputs}
    folds: dict[str, bool] = {}
    for layer in reversed(graph.layers):
        folds[layer.name] = (
            bool(layer.users)
            and id(layer) not in results
            and found[layer.name].source is not Source.ACTIVATION
            and all(
                found[user.name].source is not Source.ACTIVATION and (user.kind not in SAME_GRID or folds[user.name])
                for user in layer.users
            )
        )
    return {name: Origin(origin.source, origin.flag, origin.mask, folds[name]) for name, origin in found.items()}


def is_mask_value(value: Any) -> bool:
    """Whether a number is meant to hide a place.

    >>> is_mask_value(float("-inf")), is_mask_value(-100.0)
    (True, False)
    """
    return isinstance(value, Number) and not isinstance(value, (bool, complex)) and value <= MASKING  # type: ignore[operator]


def _origin(layer: Layer, sources: list[Origin]) -> Origin:
    if layer.kind == "input":
        flag = layer.dtype is torch.bool
        return Origin(Source.ACTIVATION if layer.is_float else Source.INTEGER, flag)
    if layer.owner is not None:
        value = getattr(layer.owner, layer.attribute)
        return Origin(Source.CONSTANT, value.dtype is torch.bool, _holds_mask(value))
    if layer.dtype is not None and not layer.is_float:  # comparisons, indices: no activation any more
        constant = all(origin.source is Source.CONSTANT for origin in sources)
        return Origin(Source.CONSTANT if constant else Source.INTEGER, layer.dtype is torch.bool)
    kinds = {origin.source for origin in sources}
    active = layer.weight_source is not None or layer.module is not None or Source.ACTIVATION in kinds
    writes = layer.kind in _FILLS or (layer.kind == "mul" and not active)
    mask = (layer.kind in _PASSES_MASK and any(origin.mask for origin in sources)) or (
        writes and any(map(is_mask_value, _numbers(layer)))
    )
    if active:
        return Origin(Source.ACTIVATION, mask=mask)
    source = Source.INTEGER if Source.INTEGER in kinds else Source.CONSTANT
    flag = layer.kind in SAME_GRID and bool(sources) and all(origin.flag for origin in sources)
    return Origin(source, flag, mask)


def _numbers(layer: Layer) -> list[Any]:
    return [v for v in pytree.tree_leaves((layer.args, layer.kwargs)) if not isinstance(v, Layer)]


def _holds_mask(value: Tensor) -> bool:
    is_buffer = not isinstance(value, nn.Parameter)
    return is_buffer and value.is_floating_point() and value.numel() > 0 and bool((value.min() <= MASKING).item())
