"""One layer whose weight is about to be rounded: its moments as a rounding problem, and the answer put to use."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.analysis.moments import Moments
from qlab.graph import Layer, LinearForm, linear_form
from qlab.quantization import WeightQuantizer, dequantize
from qlab.quantization.rounding import RoundingProblem
from qlab.sim import QuantSim
from qlab.sim.streaming import Stop

_ROUGH_ROWS = 512  # of a batch


@dataclass(frozen=True, eq=False)
class RoundingTask:
    """What a rounding technique is given for one layer, with its quantizer on the grid that its rule asks for.

    stop: the layer's inputs in both models, None where moments of an earlier run are used. moments: None where they
    would not fit in memory. takes_bias: the mean error can go into the layer's bias. holds_grid: the scale is not to be
    changed, a person froze it.
    """

    sim: QuantSim
    layer: Layer
    quantizer: WeightQuantizer
    form: LinearForm
    moments: Moments | None
    stop: Stop | None
    takes_bias: bool
    holds_grid: bool

    @property
    def weight(self) -> Tensor:
        """The float weight as a matrix [groups, M, K]."""
        return self.form.matrix(self.quantizer.weight.detach())

    def problem(self, damping: float, correct_bias: bool) -> RoundingProblem:
        """The rounding problem of the layer under its moments.

        Asymmetric: the target W* = (cross + lam W)(G + lam I)^-1 makes up for errors of the layers before, as far as
        this layer can; lam = damping * mean diag G keeps it at W where the data say nothing (dead inputs). With
        `correct_bias`, and where the layer takes one, means are left out: the bias will see to them.
        """
        moments = self.moments
        assert moments is not None
        gram, cross, weight = moments.gram.double(), moments.cross.double(), self.weight.double()
        # Moments are sums of float32: eigenvalues below this are noise, such as what is left of constant inputs.
        smallest = max(float(torch.diagonal(gram, dim1=1, dim2=2).sum(1).max()) * 1e-6, 1e-30)
        if correct_bias and self.takes_bias:
            mean = moments.mean_quantized.double()
            cross = cross - self._float_mean()[:, :, None] * mean[:, None]
            gram = gram - mean[:, :, None] * mean[:, None]
        size = torch.diagonal(gram, dim1=1, dim2=2).mean(1).clamp_min(0)
        ridge = (damping * size).clamp_min(smallest)
        metric = gram + torch.diag_embed(ridge[:, None].expand(-1, gram.shape[1]))
        lower = torch.linalg.cholesky(metric)
        target = torch.cholesky_solve((cross + ridge[:, None, None] * weight).transpose(1, 2), lower).transpose(1, 2)
        encoding = self.quantizer.required_encoding()
        scale, zero = (self._spread(values).double() for values in (encoding.scale, encoding.zero_point))
        # float32 holds the levels of 8 bits with room to spare, and its products are twice as fast.
        dtype = torch.float64 if encoding.bits > 8 else torch.float32
        parts = (target.contiguous(), metric, scale, encoding.qmin - zero, encoding.qmax - zero)
        return RoundingProblem(*(part.to(dtype) for part in parts))

    def rough_problem(self) -> RoundingProblem:
        """The weight itself as the target, every input by itself: for layers whose second moments cost too much."""
        if self.moments is not None:
            energy = torch.diagonal(self.moments.gram, dim1=1, dim2=2)
        else:
            assert self.stop is not None
            energy = self.weight.new_zeros(self.form.groups, self.form.inputs, dtype=torch.float32)
            for _, xh in self.stop.inputs(self.form.operand):
                count = self.form.positions(xh)
                few = torch.arange(0, count, max(count // _ROUGH_ROWS, 1), device=xh.device)
                energy += self.form.rows(xh, few).float().square().mean(1)
        encoding = self.quantizer.required_encoding()
        scale, zero = (self._spread(values).float() for values in (encoding.scale, encoding.zero_point))
        return RoundingProblem(
            self.weight.float(), energy[:, None].clamp_min(1e-30), scale, encoding.qmin - zero, encoding.qmax - zero
        )

    @property
    def owner(self) -> Tensor:
        """Which rows have one scale together, [groups, M] of numbers from 0: all, or those of a channel."""
        encoding = self.quantizer.required_encoding()
        first = self._numbers()[..., 0]
        return first // encoding.scale.shape[1] if encoding.scale.dim() == 2 else first

    def use_scale(self, factor: Tensor) -> None:
        """Changes the quantizer: its scale takes `factor` [owners]; nothing where all are 1."""
        if bool((factor == 1).all()):
            return
        encoding = self.quantizer.required_encoding()
        numbers = self._numbers()
        wide = factor[self.owner][..., None].expand(numbers.shape)
        factors = torch.ones_like(encoding.scale).flatten()
        factors[numbers.flatten()] = wide.flatten().to(factors.dtype)
        self.quantizer.encoding = replace(encoding, scale=encoding.scale * factors.view(encoding.scale.shape))

    def use_levels(self, levels: Tensor, correct_bias: bool) -> None:
        """Changes the quantizer: rounds to `levels` [groups, M, K], with the bias correction that they need."""
        encoding = self.quantizer.required_encoding()
        zero = self._spread(encoding.zero_point)
        codes = self.form.weight((levels.to(zero.dtype) + zero).contiguous(), self.quantizer.weight.shape)
        correction = None
        if correct_bias and self.takes_bias and self.moments is not None:
            matrix = self.form.matrix(dequantize(codes, encoding)).double()
            simulated = (matrix @ self.moments.mean_quantized.double()[..., None])[..., 0]
            correction = (self._float_mean() - simulated).flatten().to(self.quantizer.weight.dtype)
        self.quantizer.set_rounding(codes, correction)

    @torch.no_grad()
    def signal_to_noise(self) -> float:
        """SQNR in dB of the layer's output with its weight and bias as they are quantized now."""
        matrix = self.form.matrix(self.quantizer.quantized().detach())
        correction = self.quantizer.bias_correction if self.takes_bias else None
        if self.moments is not None:
            signal, noise = float(self.moments.energy.double().sum()), self.moments.error(matrix)
            if correction is not None:
                wrong = self._float_mean() - (matrix.double() @ self.moments.mean_quantized.double()[..., None])[..., 0]
                shift = correction.double().view_as(wrong)
                noise = (noise - wrong.square() + (wrong - shift).square()).clamp_min(0)
            return decibel(signal, float(noise.sum()))
        assert self.stop is not None
        signal = noise_sum = 0.0
        for x, xh in self.stop.inputs(self.form.operand):
            y = self.form.rows(x).float() @ self.weight.float().transpose(1, 2)
            wrong = y - self.form.rows(xh).float() @ matrix.float().transpose(1, 2)
            signal, noise_sum = (
                signal + float(y.double().square().sum()),
                noise_sum + float(wrong.double().square().sum()),
            )
        return decibel(signal, noise_sum)

    def _float_mean(self) -> Tensor:
        """E[y] [groups, M] of the float model, without bias."""
        assert self.moments is not None
        return (self.weight.double() @ self.moments.mean_float.double()[..., None])[..., 0]

    def _spread(self, values: Tensor) -> Tensor:
        """Values shaped as the encoding's scale, one for each entry of the matrix [groups, M, K]."""
        encoding = replace(self.quantizer.required_encoding(), scale=values)
        shape = self.quantizer.weight.shape
        return self.form.matrix(encoding.broadcast(shape)[0].expand(shape).contiguous())

    def _numbers(self) -> Tensor:
        scale = self.quantizer.required_encoding().scale
        return self._spread(torch.arange(scale.numel(), device=scale.device).view(scale.shape))


def task_of(sim: QuantSim, name: str, moments: Moments | None, stop: Stop | None, shared: bool) -> RoundingTask:
    """Changes the layer's quantizer: takes back an earlier rounding and bias correction, and returns the task of it."""
    layer, quantizer = sim.graph[name], sim.placed[name].weight
    form = linear_form(layer)
    assert quantizer is not None
    assert form is not None
    quantizer.keep_learned_range()
    quantizer.set_rounding(None)
    quantizer.set_bias_correction(None)
    takes_bias = layer.module is not None and not shared
    return RoundingTask(sim, layer, quantizer, form, moments, stop, takes_bias, quantizer.frozen)


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, -infinite without signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
