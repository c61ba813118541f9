"""A shadow of a sim: quantizers of its own over the same weights, to be toggled while the sim itself stays as it is.

Because nothing of the sim changes, there is nothing to restore after an error, and its views may go on reading it.
"""

from copy import deepcopy
from typing import Any

from qlab.analysis.bits import Bits
from qlab.errors import NotCalibrated
from qlab.quantization import Quantizer, WeightQuantizer, encoding_of_range
from qlab.sim import QuantSim


def shadow(sim: QuantSim, bits: Bits | None = None) -> QuantSim:
    """A twin of `sim` in eval mode, its quantizers set to `bits`; it costs no memory for weights.

    The twin shares modules and layers with `sim` where all of them are in eval mode, and copies them otherwise.
    """
    shared: list[Any] = [q.statistics for q in quantizers_of(sim) if not isinstance(q, WeightQuantizer)]
    if not any(module.training for module in sim.modules()):
        shared += [*sim.model.modules(), sim.graph, *sim.graph]
    twin = deepcopy(sim, {id(item): item for item in shared})
    twin.eval()
    twin.quantization_enabled = True
    if bits is not None:
        for quantizer in quantizers_of(twin):
            set_bits(quantizer, bits.weight if isinstance(quantizer, WeightQuantizer) else bits.output)
    return twin


def quantizers_of(sim: QuantSim) -> list[Quantizer]:
    """Every quantizer of `sim`, once."""
    return [quantizer for quantizer in sim.quantizers.values() if isinstance(quantizer, Quantizer)]


def set_bits(quantizer: Quantizer, bits: int | None) -> None:
    """Changes `quantizer` to `bits` (None leaves it); without statistics it keeps its range."""
    if bits is None or bits == quantizer.bits:
        return
    before = quantizer.encoding
    quantizer.bits = bits
    if quantizer.encoding is None and before is not None:  # its encoding was loaded: there is no data to ask
        low, high = before.minimum.reshape(-1), before.maximum.reshape(-1)
        quantizer.encoding = encoding_of_range(low, high, quantizer.spec, before.axis)


def require_calibrated(sim: QuantSim) -> None:
    """Raises NotCalibrated, with names, where a quantizer that is switched on has no encoding."""
    missing = [q.name for q in quantizers_of(sim) if q.enabled and q.encoding is None]
    if missing:
        names = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise NotCalibrated(
            f"{len(missing)} quantizers have no encoding ({names}): there is nothing to analyse yet. Run "
            "sim.calibrate(batches) first."
        )
