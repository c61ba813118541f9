"""Calibration: one pass over data gathers statistics of every activation; encodings follow from them.

Weights are quantized while activations are not, as in the reference (aimet-torch 2.42): the ranges are those that the
quantized weights produce. Statistics are gathered aside and adopted at the end, so an error changes nothing.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import torch

from qlab.errors import InputError, NonFiniteData
from qlab.graph import Layer
from qlab.mapped import is_mapped
from qlab.progress import Progress, Silent
from qlab.quantization import Quantizer, Statistics
from qlab.sim.batches import Batches
from qlab.sim.log import LogEntry, Marks
from qlab.sim.placement import Role
from qlab.sim.snapshot import transaction
from qlab.sim.streaming import layer_by_layer
from qlab.sim.workers import Workers

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim

_MAX_BYTES = 2 << 30  # of activations in memory where weights are mapped


def calibrate(
    sim: "QuantSim",
    batches: Any,
    progress: Progress,
    max_bytes: int | None = None,
    executor: Executor | None = None,
) -> None:
    """Changes `sim`: see QuantSim.calibrate."""
    before = Marks.of(sim)
    with transaction(sim, weights=False), torch.no_grad():
        if executor is None:
            statistics = collect_statistics(sim, Batches(batches), progress, max_bytes)
        else:
            statistics = _from_workers(sim, Batches(batches), progress, executor)
        for quantizer, seen in statistics.items():
            quantizer.adopt(seen)
        sim.log.append(LogEntry("calibrate", batches, None, before, Marks.of(sim)))


def collect_statistics(
    sim: "QuantSim", batches: Batches, progress: Progress, max_bytes: int | None = None, first: int = 0
) -> dict[Quantizer, Statistics]:
    """Statistics of every activation quantizer over `batches`; changes nothing. max_bytes: see QuantSim.calibrate.

    first: the number of the first batch, for messages. Those of several workers can be merged (`Statistics.merge`).
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
                    f"calibration batch {first + number} (counted from 0): {what} {error}. Look at that batch"
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


def _from_workers(
    sim: "QuantSim", batches: Batches, progress: Progress, executor: Executor
) -> dict[Quantizer, Statistics]:
    """The same statistics, each of several workers having seen a share of the batches."""
    workers, count = Workers(executor, sim), max(len(batches), 1)
    keys = {quantizer: key for key, quantizer in sim.quantizers.items()}
    merged: dict[str, Statistics] = {}
    seen = 0
    found = workers.map(_statistics, _shares(batches, count), lambda: progress.step(0, count, "batches on workers"))
    for part in found:
        seen += 1
        for key, statistics in part.items():
            if key in merged:
                merged[key].merge(statistics)
            else:
                merged[key] = statistics
    if not seen:
        raise InputError("calibration needs at least one batch; the iterable was empty.")
    return {quantizer: merged[key] for quantizer, key in keys.items() if key in merged}


def _shares(batches: Batches, count: int) -> Iterator[tuple[int, list[Any]]]:
    """(number of the first batch, some batches): about sixteen shares in all."""
    first, some = 0, -(-count // 16)
    share: list[Any] = []
    for batch in batches:
        share.append(batch)
        if len(share) == some:
            yield first, share
            first, share = first + some, []
    if share:
        yield first, share


def _statistics(sim: "QuantSim", share: tuple[int, list[Any]]) -> dict[str, Statistics]:
    """The statistics of a share, by the quantizer's name; in a worker."""
    keys = {quantizer: key for key, quantizer in sim.quantizers.items()}
    first, batches = share
    found = collect_statistics(sim, Batches(batches), Silent(), first=first)
    return {keys[quantizer]: statistics for quantizer, statistics in found.items()}
