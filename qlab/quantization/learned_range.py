"""A range in training: the ends of a grid as parameters, from which scale and zero point follow with gradients.

s = (high - low) / (qmax - qmin) and z = qmin - round(low / s) on an asymmetric grid, s = high / qmax on a symmetric
one. Zero stays inside: an end that the optimizer moves across zero counts as zero, and a range that collapses keeps
the smallest scale, so that the grid is valid after every step.
"""

import math

import torch
from torch import nn

from qlab.quantization.encoding import Encoding


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

    def encoding(self) -> Encoding:
        """The grid of the present ends; differentiable where gradients are enabled."""
        if torch.is_grad_enabled():
            return self._encoding()
        key = (self.high._version, self.high.data_ptr(), None if self.low is None else self.low._version)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._encoding())
        return self._cached[1]

    def _encoding(self) -> Encoding:
        given = self._template
        factor = 1.0 / math.sqrt(self.lsq_elements * given.qmax) if self.lsq_elements else 1.0
        scale, zero_point = _Grid.apply(self.low, self.high, given.qmin, given.qmax, factor)
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
    """(low, high) to (scale, zero point): one node of the graph, where ten small ones would cost more than the layer.

    Gradients are those of s = (high - low) / N and z = qmin - low / s (symmetric: s = high / qmax), times `factor`; an
    end beyond zero, and a range at the smallest scale, has none.
    """

    @staticmethod
    def forward(ctx, low, high, qmin, qmax, factor):  # type: ignore[no-untyped-def]
        floor = min(1.2e-7, 0.01 / (qmax - qmin))
        top = high.clamp_min(0.0)
        if low is None:
            ctx.steps = qmax
            scale = (top / qmax).clamp_min_(floor)
            zero_point = torch.zeros_like(scale)
            ctx.mark_non_differentiable(zero_point)
            ctx.save_for_backward(high, scale)
        else:
            ctx.steps = qmax - qmin
            bottom = low.clamp_max(0.0)
            scale = ((top - bottom) / ctx.steps).clamp_min_(floor)
            zero_point = (qmin - bottom / scale).round_().clamp_(qmin, qmax)
            ctx.save_for_backward(high, scale, low)
        ctx.floor, ctx.factor = floor, factor
        return scale, zero_point

    @staticmethod
    def backward(ctx, of_scale, of_zero_point):  # type: ignore[no-untyped-def]
        high, scale, *lows = ctx.saved_tensors
        if not lows:
            slope = of_scale * (ctx.factor / ctx.steps)
            return None, slope * ((high >= 0) & (scale > ctx.floor)), None, None, None
        low = lows[0]
        share = of_zero_point / scale
        # dz/ds = low / s^2
        slope = (of_scale + share * low.clamp_max(0.0) / scale) * ((scale > ctx.floor) / ctx.steps)
        of_low = (-slope - share) * (low <= 0) * ctx.factor
        return of_low, slope * (high >= 0) * ctx.factor, None, None, None
