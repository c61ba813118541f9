"""`qlab.validate`: everything that can be said of a model before it is quantized, and the rules that need a preset.

What stays float and which weights a grid will serve badly depends on what the target asks for; the other rules are in
qlab/graph. docs/validator.md has a section on each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlab.graph import Source
from qlab.graph.failures import rules as failure_rules
from qlab.graph.findings import Findings, Note, Rules, Severity
from qlab.graph.graph_rules import Captured
from qlab.graph.graph_rules import rules as graph_rules
from qlab.graph.kernel import Kernel, kernel_of
from qlab.graph.kinds import SAME_GRID
from qlab.graph.layer_graph import Layer
from qlab.graph.model_rules import rules as model_rules
from qlab.graph.validate import check_model
from qlab.quantization import PER_TENSOR
from qlab.sim.placement import RECURRENT, Placed, Role, place
from qlab.sim.presets import Preset, checked

rules = Rules()

_NARROW = 16  # a channel whose range is this many times below the largest loses 4 bits to it
_SHARE = 0.05  # of the channels: fewer lose so much in most trained networks, and it does no harm


def validate(model: nn.Module, example: Any, preset: Preset | None = None, dynamic: Sequence[int] = ()) -> Findings:
    """What stands in the way of quantizing `model`, what will be lost, where, why, and how to mend it.

    model, example, preset, dynamic: as QuantSim takes them; nothing is changed. Never raises for what is wrong with
    the model or the example: that is what the findings say. `findings.ok` is True where QuantSim will work.
    """
    preset = checked(preset)
    findings, captured = check_model(model, example, dynamic)
    if captured is not None:
        findings += rules.apply(Placement(captured, place(captured.graph, preset), preset))
    return Findings(findings)


@dataclass(frozen=True)
class Placement:
    """What the rules of this file look at: the captured graph and the role of each layer under a preset."""

    captured: Captured
    placed: dict[str, Placed]
    preset: Preset

    def spread(self) -> Iterator[tuple[Kernel, Placed, Tensor]]:
        """Kernels whose one grid serves channels of very different range, with the range of each channel [outputs]."""
        for layer in self.captured.folded:
            kernel, entry = kernel_of(layer), self.placed[layer.name]
            if kernel is None or entry.weight is None or entry.weight.spec.granularity != PER_TENSOR:
                continue
            ranges = kernel.grouped().abs().amax((2, 3)).reshape(-1)
            if int((_narrow(ranges)).sum()) > _SHARE * ranges.numel():
                yield kernel, entry, ranges


@rules.rule(
    "QL303",
    Severity.WARNING,
    "Channels of very different range share a grid",
    "The largest channel sets the step of a per-tensor grid; small ones are left with a few of its values. Nothing "
    "that follows can take the difference up, so cross-layer equalization leaves it.",
    "One grid a channel: weight.granularity = 'per_channel' of that layer, or presets.w8a8(per_channel=True).",
)
def unequalizable_ranges(placement: Placement) -> Iterator[Note]:
    """A wide spread of output channels, BatchNorm folded in, where no equalization reaches."""
    found, reasons = placement.captured.links
    linked = {link.first.name for link in found}
    for kernel, entry, ranges in placement.spread():
        if kernel.is_depthwise or kernel.name in linked:
            continue
        reason = reasons.get(kernel.name, "no layer takes its channels alone")
        yield Note(f"{_told(kernel, ranges)}; {reason}", kernel.name, entry.layer.location, _per_channel(kernel))


@rules.rule(
    "QL304",
    Severity.WARNING,
    "A depthwise layer with a wide spread",
    "A depthwise channel has a handful of weights, all of one size: on a grid shared with larger channels they become "
    "zero together.",
    "CrossLayerEqualization evens the channels out; or one grid a channel: weight.granularity = 'per_channel'.",
)
def spread_of_depthwise(placement: Placement) -> Iterator[Note]:
    """A wide spread of the channels of a depthwise convolution, BatchNorm folded in."""
    found, _ = placement.captured.links
    linked = {kernel.name for link in found for kernel in (link.first, link.second) if not link.clipped}
    for kernel, entry, ranges in placement.spread():
        if kernel.is_depthwise:
            remedy = "" if kernel.name in linked else _per_channel(kernel)
            yield Note(_told(kernel, ranges), kernel.name, entry.layer.location, remedy)


@rules.rule(
    "QL401",
    Severity.WARNING,
    "A layer stays in float",
    "It computes as before: a target without floating point cannot run it, others convert to float and back around it.",
    "Nothing, if the target has float. Otherwise write it with layers that have a grid, or run it outside the model.",
)
def stays_float(placement: Placement) -> Iterator[Note]:
    """Activations that get no grid, with the placement's own reason; what only passes them on is not listed."""
    for name, entry in placement.placed.items():
        layer = entry.layer
        if entry.role is not Role.FLOAT:
            continue
        origin = placement.captured.origins[name]
        if layer.kind in RECURRENT:
            yield Note(f"{name!r} ({layer.title}): {entry.reason}", name, layer.location)
        elif origin.source is Source.ACTIVATION and not origin.mask and _is_cause(layer):
            asked = "preset" in entry.reason or entry.reason.endswith("stay in float")
            severity = Severity.HINT if asked else None
            yield Note(f"{name!r} ({layer.title}): {entry.reason}", name, layer.location, severity=severity)


@rules.rule(
    "QL402",
    Severity.WARNING,
    "A weight stays in float",
    "The layer's output is rounded but its weight is not: it keeps its size, and no integer kernel can compute it.",
    "Write the layer with Conv, Linear or Embedding of torch.nn.",
)
def weight_stays_float(placement: Placement) -> Iterator[Note]:
    """A module with a matrix of weights that placement has no weight quantizer for."""
    for name, entry in placement.placed.items():
        module = entry.layer.module
        if module is None or entry.weight is not None or entry.reason == "skipped by the preset":
            continue
        large = [part for part, value in module.named_parameters(recurse=False) if _is_matrix(value)]
        if large and "norm" not in entry.layer.kind and entry.layer.kind not in RECURRENT:
            yield Note(f"{', '.join(map(repr, large))} of {name!r} ({entry.layer.title})", name, entry.layer.location)


@rules.rule(
    "QL403",
    Severity.HINT,
    "Attention is one fused step",
    "Its input and its result have grids; the scores and probabilities inside stay in float, where a target that "
    "computes them as layers rounds them.",
    "qlab.prepare(model, example, decompose=('attention',)) makes the scores, the softmax and the product layers.",
)
def fused_attention(placement: Placement) -> Iterator[Note]:
    """torch.nn.functional.scaled_dot_product_attention."""
    for name, entry in placement.placed.items():
        if entry.layer.kind == "attention" and entry.role is Role.QUANTIZED:
            yield Note(f"{name!r} computes softmax(q k) v at once", name, entry.layer.location)


ALL_RULES = Rules([*failure_rules, *model_rules, *graph_rules, *rules])
"""Every rule, in the order of the stages."""


def _is_cause(layer: Layer) -> bool:
    """Whether the layer computes with activations: it neither passes on what is float already nor asks for a size."""
    computes = layer.kind not in SAME_GRID and layer.kind != "size"
    return computes and any(source.is_float for source in layer.inputs)


def _is_matrix(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() > 1


def _narrow(ranges: Tensor) -> Tensor:
    """Which channels are narrow beside the largest; dead ones are not counted."""
    return (ranges > 0) & (ranges * _NARROW < ranges.max())


def _told(kernel: Kernel, ranges: Tensor) -> str:
    live = ranges[ranges > 0]
    ratio = float(live.max() / live.min()) if live.numel() else 1.0
    count = int(torch.count_nonzero(_narrow(ranges)))
    return (
        f"{kernel.name!r}: {count} of {ranges.numel()} channels have less than 1/{_NARROW} of the largest range "
        f"(largest over smallest: {ratio:.3g})"
    )


def _per_channel(kernel: Kernel) -> str:
    return (
        f'One grid a channel: sim["{kernel.name}"].weight.granularity = "per_channel", or '
        "presets.w8a8(per_channel=True)."
    )
