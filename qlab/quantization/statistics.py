"""What was seen of a tensor: range per channel and a histogram, so that no later choice needs the data again.

Minimum and maximum are those of every value; the histogram counts about 65,536 values of each tensor, evenly spaced:
enough for any range rule, and calibration stays cheap. Bins are multiples of a power of two. When the range grows,
neighbouring bins merge exactly, so the result depends on what was seen and not on the order of batches, and statistics
of several workers can be added.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.errors import NonFiniteData

BINS = 2048
_BLOCK = 1 << 16  # elements binned at once; index arithmetic stays in the cache
_LONG_ROW = 64  # values
_COUNTED = 1 << 16  # values of one tensor that its histogram counts; channels apart are counted whole
# Attention masks add the most negative float; what lies below is a mask, not a value, and is left out of the range.
MASK = -1e30


@dataclass(frozen=True, eq=False)
class Sample:
    """A weighted sample of a tensor, one row a channel: what range rules work on.

    Shapes: minimum, maximum [C]; values [C, n]; counts [C, n]; bin_width [C] (0 where values are exact).
    """

    minimum: Tensor
    maximum: Tensor
    values: Tensor
    counts: Tensor
    bin_width: Tensor

    @classmethod
    def of_range(cls, rows: Tensor) -> "Sample":
        """The range of each row of a tensor [C, n], without any value."""
        rows = rows.detach().float()
        low, high = torch.aminmax(rows, dim=1) if rows.shape[1] else (rows.new_zeros(len(rows)),) * 2
        if not bool((low > -math.inf).logical_and_(high < math.inf).all()):  # false for NaN as well
            raise NonFiniteData("holds NaN or infinity")
        nothing = rows.new_zeros(len(rows), 0)
        return cls(low, high, nothing, nothing, torch.zeros_like(low))

    @classmethod
    def of_rows(cls, rows: Tensor) -> "Sample":
        """The sample of a tensor [C, n] given as rows: exact up to 2,048 entries a row, by histogram above."""
        rows = rows.detach().float()
        if not torch.isfinite(rows).all():
            raise NonFiniteData("holds NaN or infinity")
        if rows.shape[1] > BINS:
            statistics = Statistics(axis=0, histogram_per_channel=True)
            statistics.update(rows)
            return statistics.sample(per_channel=True)
        low, high = (rows.amin(1), rows.amax(1)) if rows.shape[1] else (rows.new_zeros(len(rows)),) * 2
        return cls(low, high, rows, torch.ones_like(rows), torch.zeros_like(low))


class Statistics:
    """Running statistics of one tensor: per-channel minimum and maximum and one histogram (or one a channel).

    axis: the channel axis of the tensor, None where it has none.
    """

    def __init__(self, axis: int | None = None, histogram_per_channel: bool = False) -> None:
        self.axis = axis
        self.histogram_per_channel = histogram_per_channel and axis is not None
        self.minimum: Tensor | None = None  # [C]
        self.maximum: Tensor | None = None
        self.counts = torch.zeros(0, BINS, dtype=torch.int64)  # [H, BINS], H = 1 or C
        self.first = torch.zeros(0, dtype=torch.int64)  # [H] index of the first bin: it starts at first * 2^exponent
        self.exponent = torch.zeros(0, dtype=torch.int64)  # [H]
        self.elements = 0
        self.masked = 0
        self._seen = (math.inf, -math.inf)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen yet."""
        return self.minimum is None

    def update(self, x: Tensor) -> None:
        """Add the values of `x` (any device; statistics stay on the CPU). Raises NonFiniteData on NaN or infinity."""
        x = x.detach()
        if x.dtype != torch.float32:
            x = x.float()
        if x.numel() == 0:
            return
        if self.axis is not None and (x.dim() <= 1 or not -x.dim() <= self.axis < x.dim()):
            self.axis = None
        if self.axis is None:
            low, high = (bound.view(1) for bound in torch.aminmax(x))
        else:
            low, high = _range_by_channel(x, self.axis % x.dim())
        low, high = low.cpu(), high.cpu()
        smallest, largest = low.min().item(), high.max().item()
        if smallest <= MASK:
            return self._update_unmasked(x)
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise NonFiniteData("holds NaN or infinity")
        self._grow(low, high, smallest, largest)
        self._count(x)
        self.elements += x.numel()

    def merge(self, other: "Statistics") -> None:
        """Add what `other` saw; the same as having seen its data here."""
        if other.minimum is None or other.maximum is None:
            return
        self._grow(other.minimum, other.maximum, *other._seen)
        for row, counts in enumerate(other.counts):
            target = row if len(self.counts) > 1 else 0
            filled = counts.nonzero().squeeze(1)
            index = (other.first[row] + filled) >> (self.exponent[target] - other.exponent[row])
            self.counts[target].index_add_(0, index - self.first[target], counts[filled])
        self.elements += other.elements
        self.masked += other.masked

    def copy(self) -> "Statistics":
        """An independent copy."""
        twin = Statistics(self.axis, self.histogram_per_channel)
        twin.__dict__.update(self.__dict__)
        twin.counts = self.counts.clone()
        return twin

    def to_dict(self, tensors: dict[str, Tensor], key: str) -> dict[str, object]:
        """The statistics as plain values; their tensors are added to `tensors` under names that begin with `key`."""
        assert self.minimum is not None
        assert self.maximum is not None
        for name in ("minimum", "maximum", "counts", "first", "exponent"):
            tensors[f"{key}.{name}"] = getattr(self, name).contiguous()
        return {
            "axis": self.axis,
            "histogram_per_channel": self.histogram_per_channel,
            "elements": self.elements,
            "masked": self.masked,
            "seen": list(self._seen),
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any], tensors: dict[str, Tensor], key: str) -> "Statistics":
        """What `to_dict` wrote."""
        self = cls(found["axis"], found["histogram_per_channel"])
        for name in ("minimum", "maximum", "counts", "first", "exponent"):
            setattr(self, name, tensors[f"{key}.{name}"])
        self.elements, self.masked = found["elements"], found["masked"]
        self._seen = (found["seen"][0], found["seen"][1])
        return self

    def sample(self, per_channel: bool = False) -> Sample:
        """The histogram as a weighted sample: bin centres clipped to the range seen, [H, BINS]."""
        assert self.minimum is not None
        assert self.maximum is not None
        width = torch.exp2(self.exponent.double())
        centre = (self.first.double()[:, None] + torch.arange(BINS).double() + 0.5) * width[:, None]
        low, high = self.minimum, self.maximum
        if not per_channel or len(self.counts) != len(low):
            low, high = low.min().view(1), high.max().view(1)
        counts = self.counts
        if not per_channel and len(counts) > 1:
            return self._pooled().sample()
        values = torch.minimum(torch.maximum(centre.float(), low[:, None]), high[:, None])
        return Sample(low, high, values, counts.float(), width.float())

    def _pooled(self) -> "Statistics":
        """The same statistics with one histogram over all channels."""
        assert self.minimum is not None
        assert self.maximum is not None
        pooled = Statistics()
        pooled._grow(self.minimum.min().view(1), self.maximum.max().view(1), *self._seen)
        for row, counts in enumerate(self.counts):
            filled = counts.nonzero().squeeze(1)
            index = (self.first[row] + filled) >> (pooled.exponent[0] - self.exponent[row])
            pooled.counts[0].index_add_(0, index - pooled.first[0], counts[filled])
        return pooled

    def _update_unmasked(self, x: Tensor) -> None:
        """Add the values above the mask level only; channels are no longer kept apart."""
        kept = x[x > MASK]
        if bool(torch.isnan(x).any()):
            raise NonFiniteData("holds NaN or infinity")
        self.masked += x.numel() - kept.numel()
        if self.minimum is not None and len(self.minimum) > 1:
            self.minimum, self.maximum = self.minimum.min().view(1), self.maximum.max().view(1)  # type: ignore[union-attr]
        self.axis, self.histogram_per_channel = None, False
        self.update(kept)

    def _grow(self, low: Tensor, high: Tensor, smallest: float, largest: float) -> None:
        """Widen ranges to [low, high] and merge bins where the wider range needs wider ones."""
        if self.minimum is None or self.maximum is None:
            self.minimum, self.maximum = low.clone(), high.clone()
        elif len(self.minimum) != len(low):  # channels cannot be told apart any longer
            self.axis = None
            self.minimum = torch.minimum(self.minimum.min(), low.min()).view(1)
            self.maximum = torch.maximum(self.maximum.max(), high.max()).view(1)
        else:
            self.minimum, self.maximum = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        if not self.histogram_per_channel:
            if smallest >= self._seen[0] and largest <= self._seen[1]:
                return
            low, high = torch.tensor([min(smallest, self._seen[0])]), torch.tensor([max(largest, self._seen[1])])
        else:
            low, high = self.minimum, self.maximum
        self._seen = (min(smallest, self._seen[0]), max(largest, self._seen[1]))
        exponent, first = _bins(low, high)
        if len(self.counts):
            if torch.equal(exponent, self.exponent) and torch.equal(first, self.first):
                return
            counts = torch.zeros_like(self.counts)
            index = (self.first[:, None] + torch.arange(BINS)) >> (exponent - self.exponent)[:, None]
            inside = self.counts > 0  # empty bins may fall outside the new range
            counts.scatter_add_(1, torch.where(inside, index - first[:, None], 0), self.counts)
            self.counts = counts
        else:
            self.counts = torch.zeros(len(low), BINS, dtype=torch.int64)
        self.exponent, self.first = exponent, first

    def _count(self, x: Tensor) -> None:
        if len(self.counts) == 1:
            factor, first = 2.0 ** -int(self.exponent[0]), int(self.first[0])
            for block in _evenly(x.reshape(-1), x.shape).split(_BLOCK):
                index = (block * factor).floor_().sub_(first).to(torch.int64)
                self.counts[0] += torch.bincount(index, minlength=BINS).cpu()
            return
        assert self.axis is not None
        rows = x.movedim(self.axis, 0).reshape(len(self.counts), -1).cpu()
        step = max(1, 8 * _BLOCK // max(rows.shape[1], 1))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            factors = torch.exp2(-self.exponent[part].double()).float()[:, None]
            index = (rows[part] * factors).floor_().to(torch.int64) - self.first[part][:, None]
            index += BINS * torch.arange(len(index))[:, None]
            self.counts[part] += torch.bincount(index.reshape(-1), minlength=BINS * len(index)).view(-1, BINS)


def _range_by_channel(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(minimum, maximum), each [C], over all other axes.

    In memory a channel's values lie in rows. Long rows are reduced first, of short ones whole samples: several times
    faster than a reduction over both at once.
    """
    if not x.is_contiguous():
        others = [d for d in range(x.dim()) if d != axis]
        return x.amin(others), x.amax(others)
    rows = x.view(math.prod(x.shape[:axis]), x.shape[axis], -1)  # [samples, C, values of a row]
    first, then = (2, 0) if rows.shape[2] >= _LONG_ROW else (0, 1)
    return rows.amin(first).amin(then), rows.amax(first).amax(then)


def _evenly(flat: Tensor, shape: torch.Size) -> Tensor:
    """About _COUNTED values of `flat` at most: every k-th, k sharing no factor with an axis."""
    stride = -(-flat.numel() // _COUNTED)
    while any(math.gcd(stride, size) > 1 for size in shape):
        stride += 1
    return flat[::stride] if stride > 1 else flat


def _bins(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(exponent, first): the smallest power of two as bin width with which [low, high] fits into BINS aligned bins.

    The width is at least 2^-22 of the largest magnitude, so that an index is exact in float32; both results depend on
    the range alone, which makes histograms independent of the order of batches.
    """
    low, high = low.double(), high.double()
    magnitude = torch.maximum(low.abs(), high.abs()).clamp_min(2.0**-100)
    exponent = torch.maximum(
        torch.ceil(torch.log2(((high - low) / BINS).clamp_min(2.0**-140))), torch.ceil(torch.log2(magnitude)) - 22
    )
    for _ in range(2):
        width = torch.exp2(exponent)
        exponent = exponent + (torch.floor(high / width) - torch.floor(low / width) >= BINS)
    first = torch.floor(low / torch.exp2(exponent))
    return exponent.to(torch.int64), first.to(torch.int64)
