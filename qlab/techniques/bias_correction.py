"""Bias correction: rounding a weight shifts the mean of a layer's output; the bias can take that shift back."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.graph import Layer, call_layer
from qlab.graph.batch_norm import BatchNorm
from qlab.graph.kernel import Kernel, kernel_of
from qlab.graph.patterns import passes, takes, upper_bound
from qlab.progress import Progress
from qlab.quantization import WeightQuantizer
from qlab.settings import setting
from qlab.sim import QuantSim
from qlab.sim.batches import Batches
from qlab.sim.streaming import Stop, stream
from qlab.techniques.technique import Report, Technique


@dataclass(frozen=True)
class BiasCorrection(Technique):
    """Adds to each bias what rounding took from the mean of the layer's output. Deprecated: AdaRound does better.

    empirical: b <- b - E[y_quantized - y_float] for each output channel, layer after layer, each seeing the corrected
    layers before it; costs about three passes over the data. analytic: b <- b - dW E[x], without data, where E[x]
    follows from the BatchNorm before the layer and the activation between (the mean of a clipped normal distribution);
    layers without such a BatchNorm are listed. The correction belongs to the quantized weight: the float model stays
    what it was, and where weights are later changed the correction goes with them.

    When: only where rounding cannot be learned. Apply it after everything that changes weights or rounding.

    Source: Nagel et al. 2019, arXiv:1906.04721.
    """

    deprecated: ClassVar[str] = "AdaRound corrects the mean and more; bias correction is kept for completeness."

    method: str = setting(
        "empirical", "measure on data, or conclude from the BatchNorm before a layer", choices=("empirical", "analytic")
    )

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: sets the bias correction of every layer with a quantized weight."""
        kernels, notes = _correctable(sim)
        for kernel in kernels.values():
            _quantizer(sim, kernel).set_bias_correction(None)
        if not kernels:
            return Report("BiasCorrection", "no layer has a quantized weight: nothing to correct", notes=tuple(notes))
        if self.method == "empirical":
            assert batches is not None
            rows = self._empirical(sim, kernels, batches, progress)
        else:
            rows = self._analytic(sim, kernels, progress, notes)
        summary = f"corrected the bias of {len(rows)} of {len(kernels)} layers ({self.method})"
        return Report("BiasCorrection", summary, tuple(rows), tuple(notes), {"corrected": len(rows)})

    def _data(self, batches: Any) -> Batches | None:
        return None if batches is None and self.method == "analytic" else super()._data(batches)

    def _empirical(
        self, sim: QuantSim, kernels: dict[str, Kernel], batches: Batches, progress: Progress
    ) -> list[dict[str, Any]]:
        rows = []
        for stop in stream(sim, batches, kernels, progress):
            shift, size = _shift(sim, stop)
            if shift is None:
                raise InputError("BiasCorrection needs at least one batch; the iterable was empty.")
            quantizer = _quantizer(sim, kernels[stop.layer.name])
            quantizer.set_bias_correction(-shift.to(quantizer.weight.dtype))
            rows.append(_row(stop.layer.name, shift, size))
        return rows

    def _analytic(
        self, sim: QuantSim, kernels: dict[str, Kernel], progress: Progress, notes: list[str]
    ) -> list[dict[str, Any]]:
        rows, left = [], []
        for done, (name, kernel) in enumerate(kernels.items()):
            progress.step(done, len(kernels), name)
            mean = _expected_input(sim, kernel)
            if mean is None:
                left.append(name)
                continue
            quantizer = _quantizer(sim, kernel)
            error = quantizer.quantized().detach().double() - quantizer.weight.detach().double()
            shift = kernel.response(mean, error)
            quantizer.set_bias_correction(-shift.to(quantizer.weight.dtype))
            rows.append(_row(name, shift, None))
        if left:
            notes.append(
                f"{len(left)} layers have no BatchNorm whose mean could be followed to their input: {', '.join(left)}. "
                'method="empirical" corrects them, too.'
            )
        return rows


def _correctable(sim: QuantSim) -> tuple[dict[str, Kernel], list[str]]:
    """Kernels with a quantized weight of their own and a bias, and what to tell of the others."""
    found, left = {}, []
    shared = [entry.weight for entry in sim.placed.values() if entry.weight is not None and not entry.carries_weight]
    for name, entry in sim.placed.items():
        if entry.weight is None or entry.carries_weight or not entry.weight.enabled:
            continue
        kernel = kernel_of(entry.layer)
        if entry.layer.kind == "embedding":
            continue
        if kernel is None or kernel.layer.module is None:
            left.append(f"{name} (called as a function)" if entry.layer.module is None else f"{name} (no bias)")
        elif sum(weight is entry.weight for weight in shared) > 1:
            left.append(f"{name} (its weight is used more than once)")
        else:
            found[name] = kernel
    return found, [f"not corrected: {', '.join(left)}."] if left else []


def _quantizer(sim: QuantSim, kernel: Kernel) -> WeightQuantizer:
    quantizer = sim.placed[kernel.name].weight
    assert quantizer is not None
    return quantizer


@torch.no_grad()
def _shift(sim: QuantSim, stop: Stop) -> tuple[Tensor | None, float]:
    """(mean of the output's error a channel [C], standard deviation of the float output) over all batches."""
    kernel = kernel_of(stop.layer)
    assert kernel is not None
    total: Tensor | None = None
    square = mean = 0.0
    count = elements = 0
    with sim.evaluating():
        for of_float, of_sim in stop.arguments():
            wanted = call_layer(stop.layer, of_float.args, of_float.kwargs).movedim(kernel.channel_axis, 0).flatten(1)
            have = sim.compute(stop.layer, of_sim.args, of_sim.kwargs).movedim(kernel.channel_axis, 0).flatten(1)
            error = (have.double() - wanted.double()).sum(1)
            total = error if total is None else total + error
            count, elements = count + wanted.shape[1], elements + wanted.numel()
            square, mean = square + float(wanted.double().square().sum()), mean + float(wanted.double().sum())
    if total is None or not count:
        return None, 0.0
    return total / count, math.sqrt(max(square / elements - (mean / elements) ** 2, 0.0))


def _row(name: str, shift: Tensor, size: float | None) -> dict[str, Any]:
    row = {"layer": name, "mean_shift": float(shift.abs().mean()), "largest_shift": float(shift.abs().max())}
    return row if size is None else row | {"output_deviation": size}


def _expected_input(sim: QuantSim, kernel: Kernel) -> Tensor | None:
    """E[x] [inputs] of the kernel's input as far as a BatchNorm before it tells; None where it does not."""
    passed: list[Layer] = []
    layer = kernel.source
    while (moments := _moments(sim, layer)) is None:
        if not layer.args or not isinstance(layer.args[0], Layer) or layer.kind not in _FOLLOWED:
            return None
        passed.append(layer)
        layer = layer.args[0]
    mean, deviation = moments
    axis, repeat = 1, 1
    for step in reversed(passed):
        after = passes(step, layer, axis, repeat)
        if after is None:
            return None
        if step.kind in _ACTIVATIONS:
            if deviation is None:  # after an activation it is no normal distribution any more
                return None
            mean, deviation = _after_activation(mean, deviation, *_activation(step)), None
        layer, (axis, repeat) = step, after
    return mean.repeat_interleave(repeat) if takes(kernel, layer, axis, repeat) else None


_ACTIVATIONS = frozenset({"relu", "relu6", "clip", "leaky_relu", "prelu"})
_FOLLOWED = _ACTIVATIONS | {"identity", "dropout", "avg_pool", "mean", "reshape", "transpose", "upsample_nearest"}


def _moments(sim: QuantSim, layer: Layer) -> tuple[Tensor, Tensor | None] | None:
    """(mean, deviation) of a BatchNorm's output, whether it was folded or not."""
    known = sim.graph.folded.get(layer.name)
    if known is not None:
        return known.mean, known.deviation
    norm = BatchNorm.of(layer)
    return (norm.beta, norm.gamma.abs()) if norm is not None and norm.has_statistics else None


def _activation(layer: Layer) -> tuple[Tensor, float]:
    """(slope below 0, bound above) of an activation."""
    if layer.kind in ("relu6", "clip"):
        bound = upper_bound(layer)
        assert bound is not None  # or nothing would have passed
        return torch.zeros(1), bound
    if layer.kind == "relu":
        return torch.zeros(1), math.inf
    if layer.kind == "leaky_relu":
        given = layer.args[1] if len(layer.args) > 1 else 0.01
        return torch.tensor([layer.module.negative_slope if layer.module is not None else given]), math.inf
    weight = layer.module.weight if layer.module is not None else getattr(layer.args[1].owner, layer.args[1].attribute)
    return weight.detach(), math.inf


def _after_activation(mean: Tensor, deviation: Tensor, slope: Tensor, high: float) -> Tensor:
    """E[min(max(z, 0), high) + slope * min(z, 0)] of a normal z, a channel."""
    positive = _positive_part(mean, deviation)
    above = _positive_part(mean - high, deviation) if math.isfinite(high) else 0.0
    return positive - above - slope.double().to(mean.device) * _positive_part(-mean, deviation)


def _positive_part(mean: Tensor, deviation: Tensor) -> Tensor:
    """E[max(z, 0)] = mean * Phi(mean / deviation) + deviation * phi(mean / deviation) of a normal z.

    >>> round(float(_positive_part(torch.tensor([0.0]), torch.tensor([1.0]))), 4)  # 1 / sqrt(2 pi)
    0.3989
    """
    normal = torch.distributions.Normal(0.0, 1.0)
    ratio = mean / deviation.clamp_min(1e-30)
    return mean * normal.cdf(ratio) + deviation * normal.log_prob(ratio).exp()
