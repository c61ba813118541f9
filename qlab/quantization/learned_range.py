"""A range in training: the ends of a grid as parameters, from which scale and zero point follow with gradients.

s = (high - low) / (qmax - qmin) and z = qmin - round(low / s) on an asymmetric grid, s = high / qmax on a symmetric
one. Zero stays inside: an end that the optimizer moves across zero counts as zero, and a range that collapses keeps
the smallest scale, so that the grid is valid after every step.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qlab.quantization.encoding import Encoding
from qlab.quantization.fake_quantize import fake_quantize, round_backward, round_forward


class LearnedRange(nn.Module):
    """`low` and `high` in the tensor's own units, shaped as the scale they replace; `low` is unused where symmetric.

    lsq_elements: when above 0, gradients are divided by sqrt(lsq_elements * qmax), as LSQ does for a tensor of so many
    elements (Esser et al. 2020, arXiv:1902.08153).
    """

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.symmetric = _needs_no_low(encoding)
        self._template = encoding.copy()
        self.lsq_elements = 0
        self.high = nn.Parameter(torch.empty_like(encoding.scale))
        self.low = None if self.symmetric else nn.Parameter(torch.empty_like(encoding.scale))
        self._cached: tuple[object, Encoding] | None = None
        self.set_encoding(encoding)

    @property
    def is_one_range(self) -> bool:
        """Whether there is one pair of ends for the tensor or for each channel, and not for each block."""
        return self._template.block_size is None

    def takes(self, encoding: Encoding) -> bool:
        """Changes the ends to those of another grid and keeps the parameters; False, and no change, for other ends."""
        if _needs_no_low(encoding) != self.symmetric or encoding.scale.shape != self.high.shape:
            return False
        self.set_encoding(encoding)
        return True

    def set_encoding(self, encoding: Encoding) -> None:
        """Changes the ends, in place, to those of `encoding`, of the same shape."""
        self._template, self._cached = encoding.copy(), None
        with torch.no_grad():
            if self.symmetric:
                self.high.copy_(encoding.scale * encoding.qmax)
            else:
                self.high.copy_(encoding.maximum)
                assert self.low is not None
                self.low.copy_(encoding.minimum)

    @property
    def has_collapsed(self) -> bool:
        """Whether some grid is kept only by the smallest scale, or by holding zero inside."""
        with torch.no_grad():
            low = torch.zeros_like(self.high) if self.low is None else self.low
            return bool(((self.high <= 0) & (low >= 0)).any() or (self.high < 0).any() or (low > 0).any())

    @property
    def begins_at_zero(self) -> bool:
        """Whether there is one grid, and 0 is and stays its smallest value."""
        return self.low is None and self._template.qmin == 0 and self.high.dim() == 0

    def quantize(self, x: Tensor, rectifies: bool = False) -> Tensor:
        """`x` rounded to the grid of the present ends, with gradients to `x` and to them.

        rectifies: `x` stands for relu(x); only where the grid begins at zero.
        """
        if not self.is_one_range:
            return fake_quantize(x, self.encoding())
        return _Rounding.apply(x, self.low, self.high, self, rectifies)

    def encoding(self) -> Encoding:
        """The grid of the present ends; differentiable where gradients are enabled."""
        if torch.is_grad_enabled():
            return self._encoding()
        key = (self.high._version, self.high.data_ptr(), None if self.low is None else self.low._version)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._encoding())
        return self._cached[1]

    @property
    def factor(self) -> float:
        """What gradients of the ends are multiplied by."""
        return 1.0 / math.sqrt(self.lsq_elements * self._template.qmax) if self.lsq_elements else 1.0

    def _encoding(self) -> Encoding:
        given = self._template
        if torch.is_grad_enabled():
            scale, zero_point = _Grid.apply(self.low, self.high, given.qmin, given.qmax, self.factor)
        else:
            scale, zero_point = _grid_of(self.low, self.high, given.qmin, given.qmax)
        return Encoding(scale, zero_point, given.qmin, given.qmax, given.axis, given.block_size, given.block_axis)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        for name in ("low", "high"):  # model.half() must not round the range
            end = getattr(self, name)
            if end is not None and end.dtype != torch.float32:
                end.data = end.data.float()
        self._cached = None
        return self


def _needs_no_low(encoding: Encoding) -> bool:
    """Whether the grid ends at zero, or mirrors its other end."""
    return encoding.qmin < 0 or not bool(encoding.zero_point.any())


class _Grid(torch.autograd.Function):
    """(low, high) to (scale, zero point), differentiable: one node of the graph."""

    @staticmethod
    def forward(ctx, low, high, qmin, qmax, factor):  # type: ignore[no-untyped-def]
        scale, zero_point = _grid_of(low, high, qmin, qmax)
        if low is None:
            ctx.mark_non_differentiable(zero_point)
        ctx.save_for_backward(high, scale, *(() if low is None else (low,)))
        ctx.limits, ctx.factor = (qmin, qmax), factor
        return scale, zero_point

    @staticmethod
    def backward(ctx, of_scale, of_zero_point):  # type: ignore[no-untyped-def]
        high, scale, *lows = ctx.saved_tensors
        low, (qmin, qmax) = lows[0] if lows else None, ctx.limits
        return *_slopes(of_scale, of_zero_point, low, high, scale, qmin, qmax, ctx.factor), None, None, None


class _Rounding(torch.autograd.Function):
    """A tensor rounded to the grid of its range: one node of the graph, where training has one in every layer."""

    @staticmethod
    def forward(ctx, x, low, high, learned, rectifies):  # type: ignore[no-untyped-def]
        encoding = learned.encoding()
        grid = encoding.over(x.shape)
        result, ctx.bounds = round_forward(x, grid, rectifies)
        ctx.grid, ctx.scale, ctx.factor = grid, encoding.scale, learned.factor
        ctx.save_for_backward(x, result, high, *(() if low is None else (low,)))
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, result, high, *lows = ctx.saved_tensors
        grid, learns = ctx.grid, any(ctx.needs_input_grad[1:3])
        inside, of_scale, of_zero_point = round_backward(
            grad, x, result, grid, ctx.bounds, learns, learns and bool(lows)
        )
        if not learns:
            return inside, None, None, None, None
        scale, low, top = ctx.scale, lows[0] if lows else None, high
        if isinstance(of_scale, float):
            scale, low, top = grid.scalars[0], None if low is None else low.item(), high.item()
        else:
            of_scale, of_zero_point = (None if of is None else of.view(high.shape) for of in (of_scale, of_zero_point))
        of_ends = _slopes(of_scale, of_zero_point, low, top, scale, grid.qmin, grid.qmax, ctx.factor)
        return inside, *(torch.full_like(high, of) if isinstance(of, float) else of for of in of_ends), None, None


def _floor(qmin: int, qmax: int) -> float:
    """The smallest scale."""
    return min(1.2e-7, 0.01 / (qmax - qmin))


def _grid_of(low: Tensor | None, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """(scale, zero point) of the ends, without gradient: s = (high - low) / N, z = qmin - low / s."""
    floor = _floor(qmin, qmax)
    if high.dim() == 0 and high.device.type == "cpu":  # numbers cost less than tensors of one element
        bottom = 0.0 if low is None else min(low.item(), 0.0)
        scale = high.new_tensor(max((max(high.item(), 0.0) - bottom) / (qmax if low is None else qmax - qmin), floor))
        ratio = bottom / scale.item()
        zero = float(min(max(qmin - round(ratio), qmin), qmax)) if math.isfinite(ratio) else math.nan
        return scale, torch.full_like(scale, 0.0 if low is None else zero)
    top = high.clamp_min(0.0)
    if low is None:
        scale = (top / qmax).clamp_min_(floor)
        return scale, torch.zeros_like(scale)
    bottoms = low.clamp_max(0.0)
    scale = ((top - bottoms) / (qmax - qmin)).clamp_min_(floor)
    return scale, (qmin - bottoms / scale).round_().clamp_(qmin, qmax)


def _slopes(
    of_scale: Any, of_zero_point: Any, low: Any, high: Any, scale: Any, qmin: int, qmax: int, factor: float
) -> tuple[Any, Any]:
    """The gradients to (low, high), of numbers or tensors, times `factor`.

    They are those of s = (high - low) / N and z = qmin - low / s (symmetric: s = high / qmax); an end beyond zero, and
    a range at the smallest scale, has none.
    """
    moves = scale > _floor(qmin, qmax)
    if low is None:
        return None, of_scale * (factor / qmax) * ((high >= 0) & moves)
    share = of_zero_point / scale
    # dz/ds = low / s^2
    slope = (of_scale + share * (low * (low <= 0)) / scale) * moves / (qmax - qmin)
    return (-slope - share) * (low <= 0) * factor, slope * (high >= 0) * factor
