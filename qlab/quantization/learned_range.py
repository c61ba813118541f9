"""A range in training: the ends of a grid as parameters, from which scale and zero point follow with gradients.

s = (high - low) / (qmax - qmin) and z = qmin - round(low / s) on an asymmetric grid, s = high / qmax on a symmetric
one. Zero stays inside: an end that the optimizer moves across zero counts as zero, and a range that collapses keeps
the smallest scale, so that the grid is valid after every step.
"""

import math

import torch
from torch import Tensor, nn

from qlab.quantization.encoding import Encoding


class LearnedRange(nn.Module):
    """`low` and `high` in the tensor's own units, shaped as the scale they replace; `low` is unused where symmetric.

    lsq_elements: when above 0, gradients are divided by sqrt(lsq_elements * qmax), as LSQ does for a tensor of so many
    elements (Esser et al. 2020, arXiv:1902.08153).
    """

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.symmetric = encoding.qmin < 0 or not bool(encoding.zero_point.any())
        self._template = encoding.copy()
        self.lsq_elements = 0
        self.high = nn.Parameter(torch.empty_like(encoding.scale))
        self.low = None if self.symmetric else nn.Parameter(torch.empty_like(encoding.scale))
        self._cached: tuple[object, Encoding] | None = None
        self.set_encoding(encoding)

    def set_encoding(self, encoding: Encoding) -> None:
        """Changes the ends, in place, to those of `encoding`."""
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
        floor = min(1.2e-7, 0.01 / (given.qmax - given.qmin))
        high = self._scaled(self.high).clamp_min(0.0)
        if self.low is None:
            scale = (high / given.qmax).clamp_min(floor)
            zero_point = torch.zeros_like(scale)
        else:
            low = self._scaled(self.low).clamp_max(0.0)
            scale = ((high - low) / (given.qmax - given.qmin)).clamp_min(floor)
            exact = given.qmin - low / scale
            zero_point = exact + (exact.round().clamp(given.qmin, given.qmax) - exact).detach()
        return Encoding(scale, zero_point, given.qmin, given.qmax, given.axis, given.block_size, given.block_axis)

    def _scaled(self, end: Tensor) -> Tensor:
        if not self.lsq_elements:
            return end
        factor = 1.0 / math.sqrt(self.lsq_elements * self._template.qmax)
        return end * factor + (end - end * factor).detach()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        for name in ("low", "high"):  # model.half() must not round the range
            end = getattr(self, name)
            if end is not None and end.dtype != torch.float32:
                end.data = end.data.float()
        self._cached = None
        return self
