"""One layer whose weight is about to be rounded: its moments as a rounding problem, and the answer put to use.

Rows of a weight are rounded each by itself, so a large layer is taken part by part, and memory beside the weight holds
one part's problem at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qlab.analysis.moments import Moments
from qlab.graph import Layer, LinearForm, linear_form
from qlab.mapped import let_go
from qlab.quantization import WeightQuantizer
from qlab.quantization.rounding import RoundingProblem, best_factors, scale_errors
from qlab.sim import QuantSim
from qlab.sim.streaming import Stop

_ROUGH_ROWS = 512  # of a batch
_BYTES_AN_ENTRY = (
    512  # of a part: some twenty float64 copies of it live at once, and shall stay under a third of memory
)


@dataclass(frozen=True, eq=False)
class RoundingTask:
    """What a rounding technique is given for one layer, with its quantizer on the grid that its rule asks for.

    stop: the layer's inputs in both models, None where moments of an earlier run are used. moments: None where they
    would not fit in memory. takes_bias: the mean error can go into the layer's bias. holds_grid: the scale is not to be
    changed, a person froze it. max_bytes: for the work on one part.
    """

    sim: QuantSim
    layer: Layer
    quantizer: WeightQuantizer
    form: LinearForm
    moments: Moments | None
    stop: Stop | None
    takes_bias: bool
    holds_grid: bool
    max_bytes: int

    @property
    def weight(self) -> Tensor:
        """The float weight as a matrix [groups, M, K]."""
        return self.form.matrix(self.quantizer.weight.detach())

    @property
    def parts(self) -> Iterator[slice]:
        """The rows M in parts that fit in memory one after the other; what is mapped is let go after each."""
        for rows in self._slices:
            yield rows
            let_go(*(kept for kept in (self.quantizer.weight, self.quantizer.rounding) if kept is not None))

    @cached_property
    def _slices(self) -> list[slice]:
        groups, rows, columns = self.form.groups, self.form.outputs, self.form.inputs
        size = max(self.max_bytes // (_BYTES_AN_ENTRY * groups * columns), 1)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def problems(self, damping: float, correct_bias: bool) -> "Problems":
        """The rounding problem of the layer under its moments, part by part.

        Asymmetric: the target W* = (cross + lam W)(G + lam I)^-1 makes up for errors of the layers before, as far as
        this layer can; lam = damping * mean diag G keeps it at W where the data say nothing (dead inputs). With
        `correct_bias`, and where the layer takes one, means are left out: the bias will see to them.
        """
        moments = self.moments
        assert moments is not None
        gram = moments.gram.double()
        # Moments are sums of float32: eigenvalues below this are noise, such as what is left of constant inputs.
        smallest = max(float(torch.diagonal(gram, dim1=1, dim2=2).sum(1).max()) * 1e-6, 1e-30)
        mean = moments.mean_quantized.double() if correct_bias and self.takes_bias else None
        if mean is not None:
            gram = gram - mean[:, :, None] * mean[:, None]
        size = torch.diagonal(gram, dim1=1, dim2=2).mean(1).clamp_min(0)
        ridge = (damping * size).clamp_min(smallest)[:, None, None]
        metric = gram + torch.diag_embed(ridge[:, 0].expand(-1, gram.shape[1]))
        lower = torch.linalg.cholesky(metric)

        def target(rows: slice) -> Tensor:
            cross, weight = moments.cross[:, rows].double(), self.weight[:, rows].double()
            if mean is not None:
                cross = cross - self._float_mean(rows)[:, :, None] * mean[:, None]
            return torch.cholesky_solve((cross + ridge * weight).transpose(1, 2), lower).transpose(1, 2).contiguous()

        # float32 holds the levels of 8 bits with room to spare, and its products are twice as fast.
        dtype = torch.float64 if self.quantizer.required_encoding().bits > 8 else torch.float32
        return Problems(self, target, metric.to(dtype))

    def rough_problems(self) -> "Problems":
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
        return Problems(self, lambda rows: self.weight[:, rows].float(), energy[:, None].clamp_min(1e-30))

    def owner(self, rows: slice) -> Tensor:
        """Which rows have one scale together, [groups, m] of numbers from 0: all, or those of a channel."""
        encoding = self.quantizer.required_encoding()
        first = self._numbers(rows)[..., 0]
        return first // encoding.scale.shape[1] if encoding.scale.dim() == 2 else first

    def use_scale(self, factor: Tensor) -> None:
        """Changes the quantizer: its scale takes `factor` [owners]; nothing where all are 1."""
        if bool((factor == 1).all()):
            return
        encoding = self.quantizer.required_encoding()
        factors = torch.ones_like(encoding.scale).flatten()
        for rows in self.parts:
            numbers = self._numbers(rows)
            wide = factor[self.owner(rows)][..., None].expand(numbers.shape)
            factors[numbers.flatten()] = wide.flatten().to(factors.dtype)
        self.quantizer.encoding = replace(encoding, scale=encoding.scale * factors.view(encoding.scale.shape))

    def use_levels(self, levels: Iterable[tuple[slice, Tensor]], correct_bias: bool) -> None:
        """Changes the quantizer: rounds to levels [groups, m, K] of (rows, levels), all parts of them, and adds the
        bias correction that they need."""
        groups, outputs, inputs = self.form.groups, self.form.outputs, self.form.inputs
        codes = torch.empty(groups, outputs, inputs, dtype=torch.int32, device=self.quantizer.weight.device)
        wrong = self.weight.new_empty(groups, outputs, dtype=torch.float64)
        corrects = correct_bias and self.takes_bias and self.moments is not None
        for rows, found in levels:
            scale, zero = self._grid(rows)
            codes[:, rows] = (found.to(zero.dtype) + zero).to(torch.int32)
            if corrects:
                wrong[:, rows] = self._float_mean(rows) - self._mean(found.to(scale.dtype) * scale)
        shape, dtype = self.quantizer.weight.shape, self.quantizer.weight.dtype
        self.quantizer.set_rounding(
            self.form.weight(codes, shape).contiguous(), wrong.flatten().to(dtype) if corrects else None
        )

    def moved(self) -> float:
        """The share of weights that are not rounded to nearest."""
        codes, count = self.quantizer.rounding, 0
        if codes is None:
            return 0.0
        encoding = self.quantizer.required_encoding()
        matrix = self.form.matrix(codes)
        for rows in self.parts:
            scale, zero = self._grid(rows)
            nearest = (self.weight[:, rows].float() / scale).round_().add_(zero).clamp_(encoding.qmin, encoding.qmax)
            count += int((matrix[:, rows] != nearest).sum())
        return count / matrix.numel()

    @torch.no_grad()
    def signal_to_noise(self) -> float:
        """SQNR in dB of the layer's output with its weight and bias as they are quantized now."""
        if self.moments is not None:
            signal = float(self.moments.energy.double().sum())
            return decibel(signal, sum(self._noise(self.moments, rows) for rows in self.parts))
        assert self.stop is not None
        signal = noise = 0.0
        for x, xh in self.stop.inputs(self.form.operand):
            exact, given = self.form.rows(x).float(), self.form.rows(xh).float()
            for rows in self.parts:
                y = exact @ self.weight[:, rows].float().transpose(1, 2)
                wrong = y - given @ self._quantized(rows).float().transpose(1, 2)
                signal, noise = signal + float(y.double().square().sum()), noise + float(wrong.double().square().sum())
            del x, xh, exact, given  # before the next batch is read
        return decibel(signal, noise)

    def _noise(self, moments: Moments, rows: slice) -> float:
        """The squared error of these outputs, with the bias correction in force."""
        matrix = self._quantized(rows)
        noise = moments.of_rows(rows).error(matrix)
        correction = self.quantizer.bias_correction if self.takes_bias else None
        if correction is not None:
            wrong = self._float_mean(rows) - self._mean(matrix)
            shift = correction.double().view(self.form.groups, self.form.outputs)[:, rows]
            noise = (noise - wrong.square() + (wrong - shift).square()).clamp_min(0)
        return float(noise.sum())

    def _quantized(self, rows: slice) -> Tensor:
        """These rows of the weight, quantized as it is now."""
        encoding, codes = self.quantizer.required_encoding(), self.quantizer.rounding
        scale, zero = self._grid(rows)
        if codes is not None:
            return (self.form.matrix(codes)[:, rows] - zero) * scale
        levels = (self.weight[:, rows].float() / scale).round_()
        return torch.clamp(levels, encoding.qmin - zero, encoding.qmax - zero) * scale

    def _float_mean(self, rows: slice) -> Tensor:
        """E[y] [groups, m] of the float model, without bias."""
        assert self.moments is not None
        return (self.weight[:, rows].double() @ self.moments.mean_float.double()[..., None])[..., 0]

    def _mean(self, matrix: Tensor) -> Tensor:
        """E[y] [groups, m] of the sim for rows of a quantized weight, without bias."""
        assert self.moments is not None
        return (matrix.double() @ self.moments.mean_quantized.double()[..., None])[..., 0]

    def _grid(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(scale, zero point) of each entry of these rows [groups, m, K]."""
        encoding = self.quantizer.required_encoding()
        return self._spread(encoding.scale, rows), self._spread(encoding.zero_point, rows)

    def _spread(self, values: Tensor, rows: slice) -> Tensor:
        """Values shaped as the encoding's scale, one for each entry of these rows of the matrix [groups, m, K]."""
        encoding = replace(self.quantizer.required_encoding(), scale=values)
        shape = self.quantizer.weight.shape
        return self.form.matrix(encoding.broadcast(shape)[0].expand(shape))[:, rows].contiguous()

    def _numbers(self, rows: slice) -> Tensor:
        scale = self.quantizer.required_encoding().scale
        return self._spread(torch.arange(scale.numel(), device=scale.device).view(scale.shape), rows)


@dataclass(frozen=True, eq=False)
class Problems:
    """The rounding problems of a layer's parts; they share the metric, and take the quantizer's grid as it is now.

    target_of: the target of some rows.
    """

    task: RoundingTask
    target_of: Callable[[slice], Tensor]
    metric: Tensor

    def __iter__(self) -> Iterator[tuple[slice, RoundingProblem]]:
        """(rows, their problem) of each part."""
        for rows in self.task.parts:
            yield rows, self._problem(rows)

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return self.task.form.groups * self.task.form.outputs

    def search_scale(
        self,
        round_: Callable[[RoundingProblem, slice], Tensor],
        bits: int = 4,
        factors: tuple[float, ...] | None = None,
    ) -> Tensor:
        """The factors [owners] by which the scales should be changed; see `qlab.quantization.rounding.search_scale`."""

        def errors(tried: Tensor) -> Tensor:
            return torch.stack([self._errors(tried, *part, round_) for part in self]).sum(0)

        encoding = self.task.quantizer.required_encoding()
        owners = encoding.scale.shape[0] if encoding.scale.dim() else 1
        return best_factors(errors, self.metric.new_ones(owners), bits, factors)

    def _errors(
        self, tried: Tensor, rows: slice, problem: RoundingProblem, round_: Callable[[RoundingProblem, slice], Tensor]
    ) -> Tensor:
        return scale_errors(problem, self.task.owner(rows), lambda p: round_(p, rows), tried)

    def _problem(self, rows: slice) -> RoundingProblem:
        encoding = self.task.quantizer.required_encoding()
        scale, zero = (values.to(self.metric.dtype) for values in self.task._grid(rows))
        target = self._whole if len(self.task._slices) == 1 else self.target_of(rows).to(self.metric.dtype)
        return RoundingProblem(target, self.metric, scale, encoding.qmin - zero, encoding.qmax - zero)

    @cached_property
    def _whole(self) -> Tensor:
        return self.target_of(slice(None)).to(self.metric.dtype)


def task_of(
    sim: QuantSim, name: str, moments: Moments | None, stop: Stop | None, shared: bool, max_bytes: int
) -> RoundingTask:
    """Changes the layer's quantizer: takes back an earlier rounding and bias correction, and returns the task of it."""
    layer, quantizer = sim.graph[name], sim.placed[name].weight
    form = linear_form(layer)
    assert quantizer is not None
    assert form is not None
    quantizer.keep_learned_range()
    quantizer.set_rounding(None)
    quantizer.set_bias_correction(None)
    takes_bias = layer.module is not None and not shared
    return RoundingTask(sim, layer, quantizer, form, moments, stop, takes_bias, quantizer.frozen, max_bytes)


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, -infinite without signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
