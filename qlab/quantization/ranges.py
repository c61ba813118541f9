"""Range rules: from a sample of a tensor and a spec to the grid.

Every rule chooses a range per channel; `encoding_of_range` turns a range into a grid in one place. Errors of a
candidate range are computed on the sample, so no rule needs the data again.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qlab.quantization.encoding import Encoding
from qlab.quantization.spec import QuantSpec, Scheme
from qlab.quantization.statistics import Sample

Range = tuple[Tensor, Tensor]


def find_encoding(sample: Sample, spec: QuantSpec, axis: int | None = None) -> Encoding:
    """The grid for `sample` under `spec`: one scale a row; a single one ([]) for one row without axis.

    A known range wins over the rule.
    """
    if spec.known_range is not None:
        low, high = (torch.full_like(sample.minimum, bound) for bound in spec.known_range)
    else:
        low, high = RULES[spec.rule.name](sample, spec)
    return encoding_of_range(low, high, spec, axis)


def encoding_of_range(low: Tensor, high: Tensor, spec: QuantSpec, axis: int | None = None) -> Encoding:
    """The grid of `spec` that covers [low, high], zero always included and exact.

    asymmetric: s = (high - low) / N, z = round(-low / s); symmetric: s = max(high / qmax, -low / -qmin);
    N = 2^bits - 1. Scales are at least min(1.2e-7, 0.01 / N), so that constant tensors have a grid.
    Shapes: low, high [C] -> scale, zero_point [C]; scalars [] where axis is None and C = 1.
    """
    if axis is None and low.numel() == 1:
        return _one_grid(low.item(), high.item(), spec, low.device)
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    nonnegative = bool((low >= 0).all())
    qmin, qmax = spec.limits(nonnegative)
    floor = min(1.2e-7, 0.01 / (qmax - qmin))
    if spec.scheme is Scheme.ASYMMETRIC:
        # The scale is rounded to float32 first: the zero point must belong to the scale that is used.
        scale = ((high - low) / (qmax - qmin)).clamp_min(floor).float()
        zero_point = torch.round(low.abs() / scale.double()).clamp(qmin, qmax).float()
    else:
        scale = torch.maximum(high / qmax, low / qmin if qmin else torch.zeros_like(low)).clamp_min(floor).float()
        zero_point = torch.zeros_like(scale)
    return Encoding(scale, zero_point, qmin, qmax, axis)


def _one_grid(low: float, high: float, spec: QuantSpec, device: torch.device) -> Encoding:
    """`encoding_of_range` of two numbers: training asks for it at each step, and numbers cost less than tensors."""
    low, high = min(low, 0.0), max(high, 0.0)
    qmin, qmax = spec.limits(low >= 0)
    floor = min(1.2e-7, 0.01 / (qmax - qmin))
    zero_point = 0.0
    if spec.scheme is Scheme.ASYMMETRIC:
        scale = torch.tensor(max((high - low) / (qmax - qmin), floor), dtype=torch.float32)
        zero_point = float(min(max(round(abs(low) / scale.item()), qmin), qmax))
    else:
        scale = torch.tensor(max(high / qmax, low / qmin if qmin else 0.0, floor), dtype=torch.float32)
    return Encoding(scale.to(device), torch.tensor(zero_point, device=device), qmin, qmax)


def min_max(sample: Sample, spec: QuantSpec) -> Range:
    """The range seen: no value is clipped."""
    return sample.minimum, sample.maximum


def percentile(sample: Sample, spec: QuantSpec) -> Range:
    """The range between the (100 - p)th and the pth percentile, interpolated inside a bin."""
    share = (spec.rule.parameter or 99.99) / 100
    order = sample.values.argsort(1)
    values, counts = sample.values.gather(1, order).double(), sample.counts.gather(1, order).double()
    total = counts.sum(1, keepdim=True)
    # An exact sample of n values has its k-th value at share k / (n - 1); a bin spreads its count over its width.
    exact = bool((sample.bin_width == 0).all())
    reached = counts.cumsum(1)
    positions = (reached - counts) / (total - 1).clamp_min(1) if exact else (reached - counts / 2) / total

    def at(target: float) -> Tensor:
        right = torch.searchsorted(positions, torch.full_like(total, target)).clamp(1, values.shape[1] - 1)
        if values.shape[1] == 1:
            return values[:, 0].float()
        x0, x1 = positions.gather(1, right - 1), positions.gather(1, right)
        y0, y1 = values.gather(1, right - 1), values.gather(1, right)
        part = ((target - x0) / (x1 - x0).clamp_min(1e-300)).clamp(0, 1)
        return (y0 + part * (y1 - y0)).squeeze(1).float()

    if values.shape[1] == 1:
        return sample.minimum, sample.maximum
    return torch.maximum(at(1 - share), sample.minimum), torch.minimum(at(share), sample.maximum)


def mse(sample: Sample, spec: QuantSpec) -> Range:
    """The range that minimises the expected squared rounding and clipping error.

    100 shrink factors of the range seen; an asymmetric grid also tries 12 x 12 pairs of ends and refines both in turn.
    error(range) = sum over the sample of count * (x - fake_quantize(x))^2. Source: Choukroun et al. 2019,
    arXiv:1902.06822.
    """
    return _search(sample, spec, clipping_weight=1.0)


def sqnr(sample: Sample, spec: QuantSpec) -> Range:
    """As `mse`, with errors of clipped values weighted by 3 (the weight that AIMET's tf-enhanced rule uses)."""
    return _search(sample, spec, clipping_weight=3.0)


def entropy(sample: Sample, spec: QuantSpec) -> Range:
    """The range whose quantized histogram has the least Kullback-Leibler divergence from the histogram seen.

    Clipped counts join the outermost kept bins of the reference; each level's count is spread evenly over its filled
    bins. Source: S. Migacz, 8-bit inference with TensorRT, 2017. 100 shrink factors.
    """
    factors = torch.tensor(_FACTORS)[:, None]
    lows, highs = sample.minimum * factors, sample.maximum * factors
    if len(sample.minimum) == 1:  # one row: all candidates at once
        rows = replace(
            sample,
            values=sample.values.expand(len(lows), -1),
            counts=sample.counts.expand(len(lows), -1),
        )
        divergence = _divergence(rows, lows[:, 0], highs[:, 0], spec)[:, None]
    else:
        divergence = torch.stack([_divergence(sample, a, b, spec) for a, b in zip(lows, highs, strict=True)])
    best = divergence.argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def error_of_range(sample: Sample, low: Tensor, high: Tensor, spec: QuantSpec, clipping_weight: float = 1.0) -> Tensor:
    """The mean squared error of quantizing `sample` on the grid for [low, high], clipped values weighted.

    Shapes: low, high [C] -> [C]; for a sample of one row also [k] -> [k], one error a candidate.
    """
    encoding = encoding_of_range(low, high, spec, axis=0)
    scale, zero_point = encoding.scale[:, None], encoding.zero_point[:, None]
    values = sample.values
    levels = (values / scale).round_()
    kept = levels.clamp(encoding.qmin - zero_point, encoding.qmax - zero_point)
    clipped = levels.ne_(kept)  # 1.0 where clipped
    squared = kept.mul_(scale).sub_(values).square_()
    # A histogram cannot resolve steps finer than its bins: there rounding costs scale^2 / 12 whatever the value.
    fine = encoding.scale < 2 * sample.bin_width
    if bool(fine.any()):
        squared = torch.where(fine[:, None] & (clipped == 0), scale * scale / 12, squared)
    if clipping_weight != 1.0:
        squared.mul_(clipped.mul_(clipping_weight - 1.0).add_(1.0))
    return (squared * sample.counts).sum(1, dtype=torch.float64) / sample.counts.sum(1).clamp_min(1)


_BLOCK = 1 << 16  # numbers of candidates at once (measured: five times faster than all of them)
_FACTORS = tuple((i + 1) / 100 for i in reversed(range(100)))  # widest first, so that ties clip nothing


def _search(sample: Sample, spec: QuantSpec, clipping_weight: float) -> Range:
    filled = sample.counts.sum(0) > 0
    if len(sample.minimum) == 1 and not bool(filled.all()):
        sample = replace(sample, values=sample.values[:, filled], counts=sample.counts[:, filled])
    factors = torch.tensor(_FACTORS)[:, None]
    low, high = _best(sample, spec, clipping_weight, sample.minimum * factors, sample.maximum * factors)
    if spec.scheme is not Scheme.ASYMMETRIC:
        return low, high
    if bool((sample.minimum < 0).any()) and bool((sample.maximum > 0).any()):
        coarse = torch.cartesian_prod(torch.linspace(1, 1 / 12, 12), torch.linspace(1, 1 / 12, 12))
        lows = torch.cat([low[None], sample.minimum * coarse[:, :1]])
        highs = torch.cat([high[None], sample.maximum * coarse[:, 1:]])
        low, high = _best(sample, spec, clipping_weight, lows, highs)
    for reach in (0.5, 0.1):
        moves = 1 + torch.linspace(-reach, reach, 17)[:, None]
        moves = moves[(moves[:, 0] - 1).abs().argsort(stable=True)]  # staying comes first, so that ties stay
        for moves_low in (True, False):
            if not bool(((sample.minimum < 0) if moves_low else (sample.maximum > 0)).any()):
                continue  # an end at zero stays there, as after a ReLU
            lows = torch.maximum(low * moves, sample.minimum) if moves_low else low.expand(17, -1)
            highs = high.expand(17, -1) if moves_low else torch.minimum(high * moves, sample.maximum)
            low, high = _best(sample, spec, clipping_weight, lows, highs)
    return low, high


def _best(sample: Sample, spec: QuantSpec, clipping_weight: float, lows: Tensor, highs: Tensor) -> Range:
    """The candidate of least error in each channel; lows, highs [k, C]."""
    if lows.shape[1] == 1:  # one row: as many candidates at once as stay in the cache
        some = max(1, _BLOCK // max(sample.values.shape[1], 1))
        ends = zip(lows[:, 0].split(some), highs[:, 0].split(some), strict=True)
        errors = torch.cat([error_of_range(sample, a, b, spec, clipping_weight) for a, b in ends])[:, None]
    else:
        errors = torch.stack(
            [error_of_range(sample, a, b, spec, clipping_weight) for a, b in zip(lows, highs, strict=True)]
        )
    best = errors.argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def _divergence(sample: Sample, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    encoding = encoding_of_range(low, high, spec, axis=0)
    scale, zero_point = encoding.scale[:, None], encoding.zero_point[:, None]
    levels = torch.round(sample.values / scale) + zero_point
    level = levels.clamp(encoding.qmin, encoding.qmax)
    index = (level - encoding.qmin).to(torch.int64)
    counts = sample.counts.double()
    inside = (levels == level) & (counts > 0)
    size = encoding.qmax - encoding.qmin + 1
    rows, count_levels = counts.shape[0], size
    # Reference: kept bins, the clipped mass added to the outermost kept bin of its side.
    kept = torch.where(inside, counts, 0.0)
    position = torch.arange(counts.shape[1]).expand_as(counts)
    leftmost = torch.where(inside, position, counts.shape[1] - 1).amin(1, keepdim=True)
    rightmost = torch.where(inside, position, 0).amax(1, keepdim=True)
    below = torch.where(levels < level, counts, 0.0).sum(1, keepdim=True)
    above = torch.where(levels > level, counts, 0.0).sum(1, keepdim=True)
    reference = kept.scatter_add(1, leftmost, below).scatter_add(1, rightmost, above)
    mass = torch.zeros(rows, count_levels, dtype=torch.float64).scatter_add_(1, index, kept)
    filled = torch.zeros(rows, count_levels, dtype=torch.float64).scatter_add_(1, index, inside.double())
    candidate = torch.where(inside, (mass / filled.clamp_min(1)).gather(1, index), 0.0)
    p = reference / reference.sum(1, keepdim=True).clamp_min(1)
    q = candidate / candidate.sum(1, keepdim=True).clamp_min(1)
    return torch.where(p > 0, p * torch.log(p / q.clamp_min(1e-12)), 0.0).sum(1)


RULES: dict[str, Callable[[Sample, QuantSpec], Range]] = {
    "min_max": min_max,
    "percentile": percentile,
    "mse": mse,
    "sqnr": sqnr,
    "entropy": entropy,
}
