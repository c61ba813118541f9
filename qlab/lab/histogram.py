"""What a histogram view shows of one tensor: bins, the grid, the range that clips, and what is lost."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qlab.errors import SpecError
from qlab.lab.journal import PARTS, distinct
from qlab.quantization import (
    Encoding,
    Quantizer,
    Sample,
    WeightQuantizer,
    dequantize,
    encoding_of_range,
    error_of_range,
    fake_quantize,
)
from qlab.sim import QuantSim
from qlab.sim.tables import noise_on_grid


@dataclass(frozen=True, eq=False)
class HistogramData:
    """The values of one tensor before and after rounding.

    edges [B + 1], counts [B], quantized_counts [B]: bins of the float and of the rounded values. levels: DataFrame with
    `value` and `count` of each grid point; empty where the tensor has several grids and no channel was asked for.
    low, high: the range of the grid (the widest of several); None where there is no grid. clipped_share: of the values,
    outside their grid's range. channels: DataFrame with `channel`, `min`, `max`, `low`, `high` (range seen, range of
    the grid). sqnr: dB. exact: counted on the values themselves, not on a calibration histogram.
    """

    layer: str
    part: str
    channel: int | None
    edges: np.ndarray
    counts: np.ndarray
    quantized_counts: np.ndarray
    levels: pd.DataFrame
    low: float | None
    high: float | None
    clipped_share: float
    channels: pd.DataFrame
    sqnr: float
    encoding: Encoding | None
    exact: bool
    enabled: bool
    frozen: bool

    @property
    def bins(self) -> pd.DataFrame:
        """The bins as `left`, `right`, `count`, `quantized_count`, as `qlab.plots.histogram` takes them."""
        columns = (self.edges[:-1], self.edges[1:], self.counts, self.quantized_counts)
        return pd.DataFrame(dict(zip(("left", "right", "count", "quantized_count"), columns, strict=True)))

    def __repr__(self) -> str:
        where = f"{self.layer!r} {self.part}" + ("" if self.channel is None else f" channel {self.channel}")
        grid = "no grid" if self.low is None else f"range {self.low:.4g} to {self.high:.4g}"
        return f"HistogramData({where}: {grid}, clips {self.clipped_share:.2%}, SQNR {self.sqnr:.1f} dB)"


def histogram_of(
    quantizer: Quantizer,
    layer: str,
    part: str,
    channel: int | None = None,
    bins: int = 128,
    bounds: tuple[float, float] | None = None,
) -> HistogramData:
    """The histogram of what `quantizer` rounds; `bounds` (low, high) tries a range without setting it.

    Raises SpecError for a channel that the tensor does not have.
    """
    encoding = quantizer.encoding
    encoding = None if encoding is None else encoding.to("cpu")
    if bounds is not None:
        low, high = (torch.tensor([float(bound)]) for bound in bounds)
        encoding = encoding_of_range(low, high, quantizer.spec)
    if isinstance(quantizer, WeightQuantizer):
        found = _of_weight(quantizer, encoding, channel, is_tried=bounds is not None)
    else:
        found = _of_output(quantizer, encoding, channel)
    edges = _edges(found, bins)
    weights = found.counts.double().numpy()
    counts, _ = np.histogram(found.values.numpy(), edges, weights=weights)
    quantized_counts, _ = np.histogram(found.rounded.numpy(), edges, weights=weights)
    grid = found.grid
    return HistogramData(
        layer=layer,
        part=part,
        channel=channel,
        edges=edges,
        counts=np.rint(counts).astype(np.int64),
        quantized_counts=np.rint(quantized_counts).astype(np.int64),
        levels=_levels(found),
        low=None if grid is None else float(grid.minimum.min()),
        high=None if grid is None else float(grid.maximum.max()),
        clipped_share=_clipped_share(found),
        channels=_channels(quantizer, encoding),
        sqnr=found.sqnr,
        encoding=grid,
        exact=isinstance(quantizer, WeightQuantizer),
        enabled=quantizer.enabled,
        frozen=quantizer.frozen,
    )


def channels_of(sim: QuantSim, part: str) -> pd.DataFrame:
    """The `channels` of every weight or output that has a quantizer of its own, and the `layer` of each.

    Raises SpecError for a part that is neither 'weight' nor 'output'.
    """
    if part not in PARTS:
        raise SpecError(f"part must be 'weight' or 'output'; got {part!r}.")
    frames = [pd.DataFrame(columns=["layer", "channel", "min", "max", "low", "high"])]
    for quantizer in distinct(q for q in sim.quantizers.values() if isinstance(q, Quantizer)):
        if isinstance(quantizer, WeightQuantizer) == (part == "weight"):
            encoding = quantizer.encoding
            frame = _channels(quantizer, None if encoding is None else encoding.to("cpu"))
            frames.append(frame.assign(layer=quantizer.name))
    return pd.concat([frame for frame in frames if len(frame)] or frames, ignore_index=True)


def error_curve(quantizer: Quantizer, points: int = 64) -> pd.DataFrame:
    """The error of clipping at `clip`: the range seen shrunk in equal steps, mean squared as the range rules see it.

    One row a candidate: `clip` (the upper bound; the lower one where no value is positive), `low`, `high`, `error`.
    """
    if isinstance(quantizer, WeightQuantizer):
        sample = Sample.of_rows(quantizer.weight.detach().cpu().reshape(1, -1))
    elif quantizer.statistics.is_empty:
        return pd.DataFrame(columns=["clip", "low", "high", "error"], dtype=float)
    else:
        sample = quantizer.statistics.sample()
    factors = torch.linspace(1 / points, 1.0, points)
    low, high = sample.minimum.clamp(max=0) * factors, sample.maximum.clamp(min=0) * factors
    error = error_of_range(sample, low, high, quantizer.spec)
    columns = {"clip": high if float(high.max()) > 0 else low, "low": low, "high": high, "error": error}
    return pd.DataFrame({name: column.double().numpy() for name, column in columns.items()})


@dataclass(frozen=True, eq=False)
class _Found:
    """Weighted values [n], what each is rounded to, and on which grid (broadcast against `values`).

    width: of the bins that the values are the centres of, aligned at 0; None for exact values. limits: the least and
    the largest value in those bins.
    """

    values: Tensor
    counts: Tensor
    rounded: Tensor
    is_clipped: Tensor
    grid: Encoding | None
    sqnr: float
    width: float | None = None
    limits: tuple[float, float] | None = None


def _of_weight(quantizer: WeightQuantizer, encoding: Encoding | None, channel: int | None, is_tried: bool) -> _Found:
    weight = quantizer.weight.detach().cpu().float()
    assert encoding is not None
    codes = None if is_tried else quantizer.rounding
    rounded = fake_quantize(weight, encoding) if codes is None else dequantize(codes.cpu(), encoding)
    is_clipped = _is_clipped(weight, encoding)
    if channel is not None:
        _check_channel(channel, weight.shape[quantizer.axis])
        weight, rounded, is_clipped = (t.movedim(quantizer.axis, 0)[channel] for t in (weight, rounded, is_clipped))
        encoding = _grid_of(encoding, channel)
    weight, rounded = weight.reshape(-1), rounded.reshape(-1)
    signal, noise = float(weight.double().square().sum()), float((weight.double() - rounded.double()).square().sum())
    counts = torch.ones_like(weight)
    return _Found(weight, counts, rounded, is_clipped.reshape(-1), encoding, _decibel(signal, noise))


def _of_output(quantizer: Quantizer, encoding: Encoding | None, channel: int | None) -> _Found:
    statistics = quantizer.statistics
    if statistics.is_empty:
        nothing = torch.zeros(0)
        return _Found(nothing, nothing, nothing, nothing.bool(), encoding, math.nan)
    apart = len(statistics.counts) > 1
    if channel is not None:
        _check_channel(channel, len(statistics.counts) if apart else 0)
        sample, encoding = _row(statistics.sample(per_channel=True), channel), _grid_of(encoding, channel)
    elif apart and encoding is not None and encoding.scale.dim():
        return _of_rows(statistics.sample(per_channel=True), encoding)
    else:
        sample = statistics.sample()
    shown = None if encoding is None else _widest(encoding)
    rounded = sample.values if shown is None else fake_quantize(sample.values, shown)
    is_clipped = torch.zeros_like(rounded, dtype=torch.bool) if shown is None else _is_clipped(sample.values, shown)
    sqnr = math.nan if encoding is None else _decibel(_power(sample), noise_on_grid(sample, encoding))
    width = float(sample.bin_width[0])
    values, counts, rounded, is_clipped = (t.reshape(-1) for t in (sample.values, sample.counts, rounded, is_clipped))
    limits = (float(sample.minimum[0]), float(sample.maximum[0]))
    return _Found(values, counts, rounded, is_clipped, encoding, sqnr, width, limits)


def _of_rows(sample: Sample, encoding: Encoding) -> _Found:
    """An output with a grid and a histogram for each channel."""
    by_row = replace(encoding, axis=0)
    rounded, is_clipped = fake_quantize(sample.values, by_row), _is_clipped(sample.values, by_row)
    totals = sample.counts.sum(1).double()
    rows = [_row(sample, index) for index in range(len(totals))]
    signal = sum(_power(row) * float(n) for row, n in zip(rows, totals, strict=True))
    noises = [noise_on_grid(row, _grid_of(encoding, index)) for index, row in enumerate(rows)]  # type: ignore[arg-type]
    noise = sum(value * float(n) for value, n in zip(noises, totals, strict=True))
    values, counts, rounded, is_clipped = (t.reshape(-1) for t in (sample.values, sample.counts, rounded, is_clipped))
    return _Found(values, counts, rounded, is_clipped, encoding, _decibel(signal, noise))


def _edges(found: _Found, bins: int) -> np.ndarray:
    """About `bins` bins over all values; whole numbers of histogram bins where the values come from one.

    The outermost end at the values themselves: no bin reaches beyond a range that clips nothing.
    """
    seen = found.counts > 0
    if not bool(seen.any()):
        return np.linspace(0.0, 1.0, 2)
    both = torch.cat([found.values[seen], found.rounded[seen]]).double()
    low, high = float(both.min()), float(both.max())
    if found.limits is not None:
        low, high = min(found.limits[0], float(found.rounded.min())), max(found.limits[1], float(found.rounded.max()))
    if found.width:
        first, last = math.floor(low / found.width), math.floor(high / found.width)
        step = -(-(last - first + 1) // bins)
        edges = (first + step * np.arange(-(-(last - first + 1) // step) + 1)) * found.width
        if low < edges[1] and low < high:
            edges[0] = low
        if high > edges[-2]:
            edges[-1] = high
        return edges
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    edges[0], edges[-1] = low, high
    return edges


def _levels(found: _Found) -> pd.DataFrame:
    """Each grid point and how many values lie on it; empty where there are several grids."""
    grid = found.grid
    if grid is None or grid.scale.dim():
        return pd.DataFrame({"value": np.empty(0), "count": np.empty(0, dtype=np.int64)})
    codes = (found.rounded / grid.scale).round_() + grid.zero_point - grid.qmin
    size = grid.qmax - grid.qmin + 1
    index = codes.to(torch.int64).clamp_(0, size - 1)
    count = torch.bincount(index, weights=found.counts.double(), minlength=size)
    value = (torch.arange(grid.qmin, grid.qmax + 1) - grid.zero_point) * grid.scale
    return pd.DataFrame({"value": value.double().numpy(), "count": count.round().to(torch.int64).numpy()})


def _channels(quantizer: Quantizer, encoding: Encoding | None) -> pd.DataFrame:
    """The range of each channel, seen and of the grid; one row where channels were not kept apart."""
    if isinstance(quantizer, WeightQuantizer):
        weight = quantizer.weight.detach().cpu()
        rows = weight.movedim(quantizer.axis, 0).reshape(weight.shape[quantizer.axis], -1)
        low, high = rows.amin(1), rows.amax(1)
    elif quantizer.statistics.minimum is None or quantizer.statistics.maximum is None:
        return pd.DataFrame(columns=["channel", "min", "max", "low", "high"], dtype=float)
    else:
        low, high = quantizer.statistics.minimum, quantizer.statistics.maximum
    frame = pd.DataFrame({"channel": range(len(low)), "min": low.double().numpy(), "max": high.double().numpy()})
    for name, bound, widest in (("low", "minimum", torch.amin), ("high", "maximum", torch.amax)):
        edge = torch.tensor(math.nan) if encoding is None else getattr(encoding, bound).detach().double()
        edge = widest(edge, 1) if edge.dim() == 2 else edge
        frame[name] = edge.expand(len(low)).numpy() if edge.numel() in (1, len(low)) else math.nan
    return frame


def _is_clipped(values: Tensor, encoding: Encoding) -> Tensor:
    """Whether the nearest integer lies outside the grid."""
    scale, zero_point = encoding.broadcast(values.shape)
    levels = (values / scale).round_() + zero_point
    return (levels < encoding.qmin) | (levels > encoding.qmax)


def _clipped_share(found: _Found) -> float:
    total = float(found.counts.sum())
    return float((found.counts * found.is_clipped).sum()) / total if total else 0.0


def _grid_of(encoding: Encoding | None, channel: int) -> Encoding | None:
    """The grid of one channel; of a channel of blocks, all its grids; a grid for all channels as it is."""
    if encoding is None or not encoding.scale.dim():
        return encoding
    scale, zero_point = encoding.scale[channel], encoding.zero_point[channel]
    return Encoding(scale, zero_point, encoding.qmin, encoding.qmax)


def _widest(encoding: Encoding) -> Encoding:
    """One grid out of several: that with the largest step."""
    if not encoding.scale.dim():
        return encoding
    index = int(encoding.scale.reshape(-1).argmax())
    scale, zero_point = encoding.scale.reshape(-1)[index], encoding.zero_point.reshape(-1)[index]
    return Encoding(scale, zero_point, encoding.qmin, encoding.qmax)


def _row(sample: Sample, row: int) -> Sample:
    parts = (sample.minimum, sample.maximum, sample.values, sample.counts, sample.bin_width)
    return Sample(*(part[row : row + 1] for part in parts))


def _power(sample: Sample) -> float:
    return float((sample.values.double().square() * sample.counts).sum() / sample.counts.sum().clamp_min(1))


def _check_channel(channel: int, channels: int) -> None:
    if not channels:
        raise SpecError("this output has no histogram per channel: set its granularity to 'per_channel' and calibrate.")
    if not 0 <= channel < channels:
        raise SpecError(f"channel must be 0 to {channels - 1}; got {channel}.")


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
