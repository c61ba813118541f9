"""Quantization-aware training of a sim in the user's own loop: what trains, in which mode, and the usual mistakes.

regular: activation encodings stay; a weight's encoding is found from the weight anew at each step, without gradient.
range_learning: ranges of weights and activations are parameters and train with the weights.
"""

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qlab.errors import NotCalibrated, QlabError
from qlab.quantization import Quantizer, WeightQuantizer

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim

MODES = ("regular", "range_learning")


class TrainingError(QlabError, RuntimeError):
    """Training is set up in a way that would silently not do what was asked."""


def start(sim: "QuantSim", mode: str, lsq: bool) -> list[str]:
    """Changes `sim` so that it trains in `mode`; returns what had to be given up, as sentences."""
    if mode not in MODES:
        raise TrainingError(f"qat mode must be one of {list(MODES)}; got {mode!r}.")
    quantizers = [q for q in sim.quantizers.values() if isinstance(q, Quantizer) and q.enabled]
    missing = [q.name for q in quantizers if q.encoding is None]
    if missing:
        raise NotCalibrated(
            f"{len(missing)} quantizers have no encoding, the first is {missing[0]!r}. Run sim.calibrate(batches) "
            "before sim.qat(...)."
        )
    stop(sim)
    notes = []
    for quantizer in quantizers:
        if isinstance(quantizer, WeightQuantizer):
            if quantizer.rounding is not None:
                quantizer.set_rounding(None)
                quantizer.frozen = False
                notes.append(f"{quantizer.name}: the rounding found earlier is dropped, weights train from here on")
            if mode == "regular":
                quantizer.frozen = False
        if mode == "range_learning":
            quantizer.learn_range()
            if lsq and quantizer.learned is not None:
                is_weight = isinstance(quantizer, WeightQuantizer)
                seen = quantizer.weight.numel() if is_weight else quantizer.statistics.elements
                quantizer.learned.lsq_elements = max(seen, 1)
    sim.qat_mode = mode
    if mode == "range_learning":
        _watch_optimizers(sim)
    return notes


def stop(sim: "QuantSim") -> None:
    """Changes `sim` back to one that does not train; learned ranges become frozen encodings."""
    for quantizer in sim.quantizers.values():
        assert isinstance(quantizer, Quantizer)
        quantizer.keep_learned_range()
    sim.qat_mode = None


def range_parameters(sim: "QuantSim") -> Iterator[nn.Parameter]:
    """The ends of all ranges in training; none outside range learning."""
    for quantizer in sim.quantizers.values():
        assert isinstance(quantizer, Quantizer)
        if quantizer.learned is not None:
            yield from quantizer.learned.parameters()


def collapsed_ranges(sim: "QuantSim") -> list[str]:
    """Names of the quantizers whose range in training is held valid only by its bounds."""
    return [
        quantizer.name
        for quantizer in sim.quantizers.values()
        if isinstance(quantizer, Quantizer) and quantizer.learned is not None and quantizer.learned.has_collapsed
    ]


_waiting: "weakref.WeakSet[QuantSim]" = weakref.WeakSet()  # sims whose first optimizer step is still to come
_watching = False


def _watch_optimizers(sim: "QuantSim") -> None:
    """Looks at the first optimizer step that moves weights of `sim`: it must move its ranges too."""
    global _watching
    _waiting.add(sim)
    if not _watching:
        register_optimizer_step_pre_hook(_look_at_first_step)
        _watching = True


def _look_at_first_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for sim in list(_waiting):
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if sim.qat_mode == "range_learning" and not any(id(p) in moved for p in sim.model.parameters()):
            continue
        _waiting.discard(sim)
        if sim.qat_mode == "range_learning" and not any(id(p) in moved for p in range_parameters(sim)):
            raise TrainingError(
                "the optimizer does not hold the ranges: it was built before sim.qat('range_learning'). Build it "
                "afterwards, from sim.parameters(); sim.range_parameters() gives the ranges for a group of their own."
            )
