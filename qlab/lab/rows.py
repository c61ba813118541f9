"""One row a layer, as a table of layers shows it: settings, and what the statistics say is lost.

Rows are frozen values, kept until a quantizer of the layer changes, so that a row costs nothing to read again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import pandas as pd

from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim import Placed, QuantSim, Role
from qlab.sim.tables import signal_to_noise


@dataclass(frozen=True)
class LayerRow:
    """What there is to know of one layer.

    role, reason: what happens to the output and why. grid: the layer whose quantizer rounds the output; a setting of
    the output belongs there. weight_*, output_*: the quantizer's settings; None where there is none. *_sqnr: dB, of the
    weight itself and of the histogram of the output; infinite where it is switched off, NaN where there is none.
    """

    name: str
    kind: str
    title: str
    parameters: int
    role: str
    reason: str
    grid: str | None
    weight_bits: int | None
    weight_scheme: str | None
    weight_granularity: str | None
    weight_rule: str | None
    weight_enabled: bool | None
    weight_frozen: bool | None
    weight_sqnr: float
    output_bits: int | None
    output_scheme: str | None
    output_granularity: str | None
    output_rule: str | None
    output_enabled: bool | None
    output_frozen: bool | None
    output_sqnr: float


class Rows:
    """The rows of a sim, computed when asked for and kept until they change."""

    def __init__(self, sim: QuantSim) -> None:
        self._sim = sim
        self._kept: dict[str, tuple[object, LayerRow]] = {}
        self._noise: dict[int, tuple[object, float]] = {}
        self.names = tuple(name for name, entry in sim.placed.items() if _is_shown(entry))

    def row(self, name: str) -> LayerRow:
        """The row of one layer; raises UnknownLayer."""
        entry = self._sim[name]._placed
        key = (entry.role, entry.reason, entry.layer.kind, _key(entry.weight), _key(entry.output))
        kept = self._kept.get(name)
        if kept is None or kept[0] != key:
            self._kept[name] = kept = (key, self._new(entry))
        return kept[1]

    def rows(self) -> list[LayerRow]:
        """All rows, in order of execution."""
        return [self.row(name) for name in self.names]

    def affected(self, quantizers: Iterable[Quantizer]) -> tuple[str, ...]:
        """The layers whose row shows one of these quantizers."""
        ids = {id(quantizer) for quantizer in quantizers}
        placed = self._sim.placed
        return tuple(name for name in self.names if id(placed[name].weight) in ids or id(placed[name].output) in ids)

    def _new(self, entry: Placed) -> LayerRow:
        layer = entry.layer
        weight, output = (None if entry.carries_weight else entry.weight), entry.output
        return LayerRow(
            name=layer.name,
            kind=layer.kind,
            title=layer.title,
            parameters=layer.parameters,
            role=entry.role.value,
            reason=entry.reason,
            grid=None if output is None else output.name,
            weight_bits=None if weight is None else weight.bits,
            weight_scheme=None if weight is None else weight.scheme.value,
            weight_granularity=None if weight is None else str(weight.granularity),
            weight_rule=None if weight is None else str(weight.rule),
            weight_enabled=None if weight is None else weight.enabled,
            weight_frozen=None if weight is None else weight.frozen,
            weight_sqnr=self._sqnr(weight),
            output_bits=None if output is None else output.bits,
            output_scheme=None if output is None else output.scheme.value,
            output_granularity=None if output is None else str(output.granularity),
            output_rule=None if output is None else str(output.rule),
            output_enabled=None if output is None else output.enabled,
            output_frozen=None if output is None else output.frozen,
            output_sqnr=self._sqnr(output),
        )

    def _sqnr(self, quantizer: Quantizer | None) -> float:
        """Computed once for all layers that share the quantizer."""
        if quantizer is None:
            return math.nan
        if not quantizer.enabled:
            return math.inf
        key = _key(quantizer)
        kept = self._noise.get(id(quantizer))
        if kept is None or kept[0] != key:
            self._noise[id(quantizer)] = kept = (key, signal_to_noise(quantizer))
        return kept[1]


def table(rows: Iterable[LayerRow]) -> pd.DataFrame:
    """Rows as a DataFrame; numbers that a layer lacks are missing values."""
    frame = pd.DataFrame(list(rows), columns=[field.name for field in fields(LayerRow)])
    return frame.astype({"weight_bits": "Int64", "output_bits": "Int64"})


def differences(before: Mapping[str, LayerRow], after: Mapping[str, LayerRow]) -> pd.DataFrame:
    """One row (layer, setting, before, after) for each value that differs."""
    rows = []
    for name, row in after.items():
        for field in fields(LayerRow):
            old, new = getattr(before[name], field.name), getattr(row, field.name)
            if old != new and not (old != old and new != new):  # NaN equals NaN here
                rows.append((name, field.name, old, new))
    return pd.DataFrame(rows, columns=["layer", "setting", "before", "after"])


def size_bytes(sim: QuantSim) -> int:
    """The bytes of all parameters: those with an enabled weight quantizer at its bits, the others at 4 bytes a number.

    A parameter that several layers share counts once.
    """
    quantizers = [entry.weight for entry in sim.placed.values() if entry.weight is not None and entry.weight.enabled]
    bits = {id(quantizer.weight): quantizer.bits for quantizer in quantizers}
    return sum(-(-p.numel() * bits.get(id(p), 32) // 8) for p in sim.model.parameters())


def _is_shown(entry: Placed) -> bool:
    """Whether the layer produces a tensor of the model, or holds a quantizer."""
    layer = entry.layer
    if layer.kind == "parameter":
        return False
    return (
        layer.dtype is not None or entry.weight is not None or entry.output is not None or entry.role is not Role.FLOAT
    )


def _key(quantizer: Quantizer | None) -> object:
    if quantizer is None:
        return None
    encoding = quantizer.encoding  # found now if the weight has changed, so that the version counts it
    seen = None if isinstance(quantizer, WeightQuantizer) else quantizer.statistics  # a frozen grid outlives them
    counted = None if seen is None else seen.elements
    return quantizer.version, quantizer.enabled, quantizer.frozen, encoding is None, seen, counted
