"""Calibration: one pass over data gathers statistics of every activation; encodings follow from them.

Weights are quantized while activations are not, as in the reference (aimet-torch 2.42): the ranges are those that the
quantized weights produce. Statistics are gathered aside and adopted at the end, so an error changes nothing.
"""

from typing import TYPE_CHECKING, Any

import torch

from qlab.errors import InputError, NonFiniteData
from qlab.graph import Layer
from qlab.mapped import is_mapped
from qlab.progress import Progress
from qlab.quantization import Quantizer, Statistics
from qlab.sim.batches import Batches
from qlab.sim.log import LogEntry, Marks
from qlab.sim.placement import Role
from qlab.sim.snapshot import transaction
from qlab.sim.streaming import layer_by_layer

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim

_MAX_BYTES = 2 << 30  # of activations in memory where weights are mapped


def calibrate(sim: "QuantSim", batches: Any, progress: Progress, max_bytes: int | None = None) -> None:
    """Changes `sim`: see QuantSim.calibrate."""
    before = Marks.of(sim)
    with transaction(sim, weights=False), torch.no_grad():
        statistics = collect_statistics(sim, Batches(batches), progress, max_bytes)
        for quantizer, seen in statistics.items():
            quantizer.adopt(seen)
        sim.log.append(LogEntry("calibrate", batches, None, before, Marks.of(sim)))


def collect_statistics(
    sim: "QuantSim", batches: Batches, progress: Progress, max_bytes: int | None = None
) -> dict[Quantizer, Statistics]:
    """Statistics of every activation quantizer over `batches`; changes nothing. max_bytes: see QuantSim.calibrate.

    Those of several workers can be merged (`Statistics.merge`) before they are adopted.
    """
    observed = {
        layer.index: entry.output
        for layer in sim.graph
        if (entry := sim.placed[layer.name]).role is Role.QUANTIZED and entry.output is not None
    }
    statistics = {
        quantizer: Statistics(quantizer.axis, quantizer.granularity.kind != "per_tensor")
        for quantizer in observed.values()
    }
    number = 0

    def call(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = sim.compute(layer, args, kwargs)
        quantizer = observed.get(layer.index)
        if quantizer is not None:
            try:
                statistics[quantizer].update(value)
            except NonFiniteData as error:
                what = "the data itself" if layer.kind == "input" else f"the output of layer {layer.name!r}"
                raise NonFiniteData(
                    f"calibration batch {number} (counted from 0): {what} {error}. Look at that batch"
                    + ("." if layer.kind == "input" else ", or at the weights of the layers before it.")
                ) from None
        return value

    def at_batch(batch: int, done: int, total: int) -> None:
        nonlocal number
        number = batch
        each = max(len(batches), batch + 1)
        progress.step(done * each + batch, total * each, f"batch {batch}")

    if max_bytes is None and any(map(is_mapped, sim.model.parameters())):
        max_bytes = _MAX_BYTES
    with sim.evaluating(), torch.no_grad():
        if max_bytes is not None:
            seen = layer_by_layer(sim, batches, call, at_batch, max_bytes)
        else:
            seen = 0
            for batch in batches:
                at_batch(seen, 0, 1)
                sim.graph.run(sim.inputs(batch), call)
                seen += 1
    if not seen:
        raise InputError("calibration needs at least one batch; the iterable was empty.")
    return statistics
