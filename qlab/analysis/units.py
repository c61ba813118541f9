"""Units: what is switched on and off together, and so gets one row of an analysis.

A unit is a layer as a person sees it: its weight quantizer and the quantizer that governs its output, so that a fused
convolution + BatchNorm + ReLU is one unit. (The reference has one row for the convolution's weight and one for the
ReLU's output; `by="quantizer"` keeps them apart.) Layers that share a quantizer, the inputs of a concatenation or tied
weights, are one unit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from qlab.errors import InputError, UnknownLayer, nearest
from qlab.quantization import Quantizer
from qlab.sim import Placed, QuantSim, Role
from qlab.sim.integer_kernels import requantizer
from qlab.sim.placement import matches_glob


@dataclass(frozen=True)
class Unit:
    """Quantizers that are switched together.

    layer: the name of the row, the first layer with a weight, else the first. part: 'layer', or 'weight' or 'output'
    where quantizers are kept apart. layers: every layer that one of the quantizers belongs to. quantizers: their keys
    in `sim.quantizers`. tensors: the same as (layer, 'weight' or 'output').
    """

    layer: str
    part: str
    layers: tuple[str, ...]
    quantizers: tuple[str, ...]
    tensors: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.layer if self.part == "layer" else f"{self.layer} {self.part}"


def units_of(sim: QuantSim, by: str = "layer") -> list[Unit]:
    """The units of `sim` in order of execution; quantizers that are switched off belong to none and stay off.

    by: 'layer' or 'quantizer'.
    """
    keys = {id(quantizer): key for key, quantizer in sim.quantizers.items()}
    roots = {key: key for key in keys.values()}

    def root(key: str) -> str:
        while roots[key] != key:
            key = roots[key]
        return key

    held = {name: _quantizers(entry) for name, entry in sim.placed.items()}
    if by == "layer":
        for quantizers in held.values():
            for first, second in pairwise(keys[id(q)] for q in quantizers):
                roots[root(second)] = root(first)
    members: dict[str, dict[str, None]] = {}
    parts: dict[str, dict[str, None]] = {}
    for name, quantizers in held.items():
        for quantizer in quantizers:
            if quantizer.enabled:
                key = keys[id(quantizer)]
                members.setdefault(root(key), {})[name] = None
                parts.setdefault(root(key), {})[key] = None
    units = []
    for group, layers in members.items():
        weighted = [name for name in layers if sim.placed[name].weight is not None]
        tensors = tuple((_tensor_layer(sim, key), key.rpartition(":")[2]) for key in parts[group])
        part = "layer" if by == "layer" else tensors[0][1]
        name = tensors[0][0] if part == "output" else next(iter(weighted or layers))
        units.append(Unit(name, part, tuple(layers), tuple(parts[group]), tensors))
    return sorted(units, key=lambda unit: sim.graph[unit.layer].index)


def chosen_units(units: list[Unit], sim: QuantSim, patterns: str | Iterable[str] | None) -> list[Unit]:
    """The units with a layer that matches one of the globs; raises UnknownLayer for a glob that matches nothing."""
    if patterns is None:
        return list(units)
    globs = [part.strip() for part in patterns.split(",")] if isinstance(patterns, str) else list(patterns)
    for glob in globs:
        if not any(matches_glob(name, glob) for name in sim.placed):
            raise UnknownLayer(f"layers={glob!r} matches no layer. {nearest(glob, sim.placed)}")
    found = [unit for unit in units if any(matches_glob(name, glob) for name in unit.layers for glob in globs)]
    if not found:
        raise InputError(
            f"none of the layers that match {', '.join(map(repr, globs))} has a quantizer that is switched on: there "
            "is nothing to measure. sim.coverage() says what is quantized."
        )
    return found


def acting_layers(sim: QuantSim, quantizers: Iterable[str]) -> list[str]:
    """The layers whose own computation changes when these quantizers are switched."""
    switched = {id(sim.quantizers[key]) for key in quantizers}
    found = []
    for name, entry in sim.placed.items():
        own = [entry.weight, entry.output if entry.role is Role.QUANTIZED else None]
        if sim.preset.int32_bias:  # an integer kernel rounds its sum to the grid behind the ReLU that it is fused with
            own.append(requantizer(sim, entry.layer))
        if any(quantizer is not None and id(quantizer) in switched for quantizer in own):
            found.append(name)
    return found


def _quantizers(entry: Placed) -> list[Quantizer]:
    """The quantizers that a layer is seen with: its weight's and the one that governs its output."""
    if entry.carries_weight:
        return []
    governs = entry.role in (Role.QUANTIZED, Role.FUSED)
    found = [entry.weight, entry.output if governs else None]
    return [quantizer for quantizer in found if quantizer is not None]


def _tensor_layer(sim: QuantSim, key: str) -> str:
    """The layer whose weight or output a quantizer rounds."""
    quantizer = sim.quantizers[key]
    assert isinstance(quantizer, Quantizer)
    return quantizer.name
