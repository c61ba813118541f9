"""Which rows of an analysis still hold after the sim was edited.

With only one layer quantized, the rest of the model is float: such a row depends on that layer's quantizers and on the
float model alone, so an edit of one layer makes one row old.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qlab.analysis.units import Unit
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim import QuantSim

_sums: WeakKeyDictionary[QuantSim, tuple[Hashable, float]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Fingerprint:
    """What the numbers of an analysis depend on: the float model, as a sum, and what each row's layers were set to."""

    model: float = math.nan
    rows: Mapping[tuple[str, str], Hashable] = field(default_factory=dict)

    @classmethod
    def of(cls, sim: QuantSim, units: Iterable[Unit]) -> "Fingerprint":
        """The present fingerprint of `sim`."""
        return cls(_sum(sim), {(unit.layer, unit.part): _settings(sim, unit) for unit in units})

    def changed(self, sim: QuantSim, units: Iterable[Unit]) -> list[Unit]:
        """The units that would have other numbers in `sim` as it is now; all where the float model is another."""
        if _sum(sim) != self.model:
            return list(units)
        return [unit for unit in units if self.rows.get((unit.layer, unit.part)) != _settings(sim, unit)]

    def updated(self, other: "Fingerprint") -> "Fingerprint":
        """This fingerprint with the rows that `other` knows."""
        return Fingerprint(other.model, {**self.rows, **other.rows})


@torch.no_grad()
def _sum(sim: QuantSim) -> float:
    """A number that another float model hardly has; added up again when a tensor was written to."""
    tensors = [t for t in (*sim.model.parameters(), *sim.model.buffers()) if t.is_floating_point()]
    version = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    known = _sums.get(sim)
    if known is None or known[0] != version:
        total = sum((number + 1) * float(tensor.double().sum()) for number, tensor in enumerate(tensors))
        known = _sums[sim] = (version, total)
    return known[1]


def _settings(sim: QuantSim, unit: Unit) -> Hashable:
    """What the quantizers of a unit's layers are set to, those that are switched off as well."""
    held = [(sim.placed[name].weight, sim.placed[name].output) for name in unit.layers]
    return tuple(None if quantizer is None else _setting(quantizer) for pair in held for quantizer in pair)


def _setting(quantizer: Quantizer) -> Hashable:
    encoding = quantizer.encoding
    grid = None if encoding is None else (encoding.qmin, encoding.qmax, *_numbers(encoding.scale, encoding.zero_point))
    chosen = (quantizer.rounding, quantizer.bias_correction) if isinstance(quantizer, WeightQuantizer) else ()
    return quantizer.spec, quantizer.enabled, grid, _numbers(*(tensor for tensor in chosen if tensor is not None))


def _numbers(*tensors: Tensor) -> tuple[bytes, ...]:
    return tuple(tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors)
