"""Rules that look at the captured graph: reuse, computed weights, and what quantization will find hard.

Each rule is a function that yields Notes; docs/validator.md has a section on each.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qlab.graph.batch_norm import BatchNorm
from qlab.graph.example import cloned
from qlab.graph.findings import Note, Rules, Severity
from qlab.graph.folding import fold_in_float, why_not_folded
from qlab.graph.kernel import kernel_of
from qlab.graph.kinds import KNOWN_RANGES, SAME_GRID
from qlab.graph.layer_graph import WEIGHT_POSITION, Layer, LayerGraph, call_layer
from qlab.graph.origins import Origin, Source, origins
from qlab.graph.patterns import Link, Uses, links, upper_bound
from qlab.graph.weight_views import viewed_weight

rules = Rules()

CHANNEL_MULTIPLE = 32
"""Vector and matrix units of integer accelerators take channels by 16, 32 or 64; 32 serves most."""


@dataclass(frozen=True)
class Captured:
    """What graph rules look at: the graph, and for each float layer the (least, largest) value on the example."""

    graph: LayerGraph
    extremes: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, graph: LayerGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Captured":
        """`graph` after one run on the arguments."""
        extremes: dict[str, tuple[float, float]] = {}

        def call(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = call_layer(layer, args, kwargs)
            if layer.is_float and isinstance(value, Tensor) and value.numel():
                least, largest = value.aminmax()
                extremes[layer.name] = (float(least), float(largest))
            return value

        with torch.no_grad():
            graph.run(graph.bind(cloned(args), cloned(kwargs)), call)
        return cls(graph, extremes)

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Where each layer's value comes from."""
        return origins(self.graph)

    @cached_property
    def folded(self) -> LayerGraph:
        """A copy with every BatchNorm folded that can be, as cross-layer equalization finds it."""
        graph = copy.deepcopy(self.graph)
        fold_in_float(graph)
        return graph

    @cached_property
    def links(self) -> tuple[list[Link], dict[str, str]]:
        """Pairs of layers that can be equalized after folding, and for the others what stands in the way."""
        return links(self.folded)


@rules.rule(
    "QL201",
    Severity.HINT,
    "A module is called more than once",
    "Each call has its own output grid, but one weight: folding, equalization and bias correction leave it alone.",
    "qlab.prepare(model, example) makes one module of each call (weights stay shared). Or write one module a call.",
)
def reused_module(captured: Captured) -> Iterator[Note]:
    """One module in several layers: a warning where it has weights."""
    calls: dict[int, list[Layer]] = defaultdict(list)
    for layer in captured.graph:
        if layer.module is not None:
            calls[id(layer.module)].append(layer)
    for first, *others in calls.values():
        if others:
            severity = Severity.WARNING if first.parameters else None
            told = f"{first.name!r} is called {1 + len(others)} times, again as {_listed(others)}"
            yield Note(told, first.name, others[0].location, severity=severity)


@rules.rule(
    "QL207",
    Severity.WARNING,
    "A weight is computed in forward",
    "What is quantized is the computed value, on the grid of an activation; techniques that round weights pass it by.",
    "Make it a plain weight: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), or for the old form "
    "torch.nn.utils.remove_weight_norm(module).",
)
def computed_weight(captured: Captured) -> Iterator[Note]:
    """Weight norm, spectral norm, or arithmetic on a parameter before it is used as a weight."""
    for layer in captured.graph:
        position = WEIGHT_POSITION.get(layer.function_name)
        if (
            position is None
            or layer.weight_source is not None
            or viewed_weight(layer)
            or len(layer.args) <= position[0]
        ):
            continue
        operand = layer.args[position[0]]
        if isinstance(operand, Layer) and operand.is_float and captured.origins[operand.name].source is Source.CONSTANT:
            yield Note(f"the weight of {layer.name!r} is computed by {operand.title}", layer.name, layer.location)


@rules.rule(
    "QL208",
    Severity.ERROR,
    "Values become NaN or infinite",
    "A grid spans the range of a tensor; with NaN or infinity there is none, and calibration refuses the batch.",
    "Look at what this layer does on the example: a division by zero, the logarithm of zero, an overflow.",
)
def becomes_not_finite(captured: Captured) -> Iterator[Note]:
    """The first layers that make NaN or +infinity of finite values; -infinity may be a mask."""
    broken = {name for name, (least, largest) in captured.extremes.items() if math.isnan(least) or largest == math.inf}
    for layer in captured.graph:
        if layer.name in broken and not any(source.name in broken for source in layer.inputs):
            yield Note(f"the output of {layer.name!r} ({layer.title}) is not finite on the example", layer.name)


@rules.rule(
    "QL301",
    Severity.WARNING,
    "BatchNorm cannot be folded",
    "Targets compute a convolution and its BatchNorm as one. This one stays a layer with a grid of its own, and keeps "
    "its neighbours from being equalized.",
    "Place BatchNorm directly behind the convolution or linear layer that alone feeds it, each module called once.",
)
def unfoldable_norm(captured: Captured) -> Iterator[Note]:
    """BatchNorm that neither the layer before nor the one after can take."""
    uses = Uses(captured.graph)
    for layer in captured.graph:
        norm = BatchNorm.of(layer)
        if norm is not None and (reason := why_not_folded(captured.graph, uses, norm)):
            yield Note(f"{layer.name!r} stays: {reason}", layer.name)


@rules.rule(
    "QL302",
    Severity.HINT,
    "ReLU6 keeps two layers apart",
    "ReLU6 cuts at a fixed value, so that no factor passes it and cross-layer equalization stops there.",
    "CrossLayerEqualization(replace_relu6=True) puts ReLU in its place; the report says what that changes in float. "
    "Better: train with ReLU.",
)
def relu6_between(captured: Captured) -> Iterator[Note]:
    """Layers that could be equalized but for ReLU6 or hardtanh between them."""
    for link in captured.links[0]:
        for layer in link.clipped:
            told = f"{layer.name!r} ({layer.title}) is between {link.first.name!r} and {link.second.name!r}"
            yield Note(told, layer.name)


@rules.rule(
    "QL305",
    Severity.HINT,
    "Softmax takes values without a bound",
    "A step of the grid becomes a factor of exp(step) in the probabilities, and a few large values make all steps "
    "wide.",
    "Look at this layer first where the score falls: 16 bits for the softmax's input, or a range rule that clips "
    "(rule='percentile').",
)
def unbounded_softmax(captured: Captured) -> Iterator[Note]:
    """A softmax whose input is bounded by no sigmoid, tanh or clip."""
    for layer in captured.graph:
        source = next((source for source in layer.inputs if source.is_float), None)
        if layer.kind not in ("softmax", "logsoftmax", "log_softmax", "_log_softmax") or source is None:
            continue
        logits = _without_masks(source, captured)
        if captured.origins[logits.name].source is not Source.ACTIVATION or _is_bounded(logits):
            continue
        least, largest = captured.extremes.get(logits.name, (math.nan, math.nan))
        step = (largest - least) / 255
        yield Note(
            f"{logits.name!r} takes values from {least:.3g} to {largest:.3g} on the example: a step of 8 bits is a "
            f"factor of {math.exp(min(step, 700.0)):.3g}",
            layer.name,
        )


@rules.rule(
    "QL306",
    Severity.HINT,
    f"Channels are no multiple of {CHANNEL_MULTIPLE}",
    "Integer accelerators take channels in blocks and fill the last one with zeros: what is missing is computed all "
    "the same.",
    f"Where the architecture is free, round channel counts up to a multiple of {CHANNEL_MULTIPLE}.",
)
def odd_channels(captured: Captured) -> Iterator[Note]:
    """Output channels of convolutions and linear layers, the model's results left out: one note a count."""
    results = {id(output) for output in captured.graph.outputs}
    found: dict[int, list[Layer]] = defaultdict(list)
    for layer in captured.graph:
        kernel = kernel_of(layer)
        if kernel is not None and id(layer) not in results and kernel.outputs % CHANNEL_MULTIPLE:
            found[kernel.outputs].append(layer)
    for count, layers in found.items():
        used = count / (math.ceil(count / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE)
        told = f"{count} channels, {used:.0%} of the blocks they fill: {_listed(layers)}"
        yield Note(told, layers[0].name)


def _listed(layers: list[Layer]) -> str:
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    return ", ".join(repr(layer.name) for layer in layers[:4]) + more


def _without_masks(layer: Layer, captured: Captured) -> Layer:
    """The values that a mask is added to or fills, the layer itself where there is no mask."""
    while captured.origins[layer.name].mask:
        values = [
            source
            for source in layer.inputs
            if source.is_float and captured.origins[source.name].source is Source.ACTIVATION
        ]
        if len(values) != 1:
            break
        layer = values[0]
    return layer


def _is_bounded(layer: Layer) -> bool:
    """Whether the values have a bound that does not depend on data."""
    if layer.kind in KNOWN_RANGES or layer.kind == "relu6":
        return True
    if layer.kind == "clip":
        return (upper_bound(layer) or math.inf) < math.inf or _has_two_limits(layer)
    passes = layer.kind in SAME_GRID | {"avg_pool", "mean"} or (layer.kind in ("mul", "div") and len(layer.inputs) == 1)
    return passes and len(layer.inputs) == 1 and _is_bounded(layer.inputs[0])


def _has_two_limits(layer: Layer) -> bool:
    if layer.module is not None:  # nn.Hardtanh
        return True
    limits = [*layer.args[1:], *layer.kwargs.values()]
    return layer.function_name == "hardtanh" or sum(isinstance(v, (int, float)) for v in limits) == 2
