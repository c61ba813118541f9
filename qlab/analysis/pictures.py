"""Figures of sims and analyses: tables made here, drawn by qlab.plots, which is imported when a figure is asked for.

Each function returns a `qlab.plots.Plot`: it shows in a notebook, saves as one page, and updates in place.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qlab.analysis.distributions import channel_ranges, histogram_frame
from qlab.errors import InputError
from qlab.quantization import Quantizer
from qlab.sim import QuantSim

if TYPE_CHECKING:
    from qlab.analysis.analysis import Analysis
    from qlab.plots import (
        ComparisonFigure,
        HistogramFigure,
        NoiseFigure,
        RangesFigure,
        RelativeRangesFigure,
        SensitivityFigure,
    )

LEVELS = 4096  # grids with more levels are drawn without them
_TITLES = {"enabled": "only this layer quantized", "disabled": "all but this layer quantized"}


def sensitivity(analysis: "Analysis", mode: str = "enabled") -> "SensitivityFigure":
    """The score of each row as a bar from the score without it; several widths side by side."""
    from qlab import plots

    frame, baseline = sensitivity_frame(analysis.table(mode), mode, analysis.summary)
    return plots.sensitivity(frame, baseline=baseline, score_name=name_of(analysis))


def sensitivity_frame(
    rows: pd.DataFrame, mode: str, summary: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, float] | float | None]:
    """(the frame, the baseline) for `qlab.plots.sensitivity`, from rows as they are known so far.

    Where the baseline is infinite (the SQNR of a float model), bars start at the best finite score.
    """
    mine = rows[rows["mode"] == mode]
    series = [f"{_TITLES[mode]}, {bits}" + (" bits" if bits != "as set" else "") for bits in mine.bits]
    names = [layer if part == "layer" else f"{layer} {part}" for layer, part in zip(mine.layer, mine.part, strict=True)]
    score = mine.score.where(np.isfinite(mine.score))
    error = mine.change_error.where(np.isfinite(mine.change_error), mine.error)  # of the bar: of the difference
    frame = pd.DataFrame({"layer": names, "series": series, "score": score, "error": error, "note": mine.note})
    frame = frame.reset_index(drop=True)
    best = float(score.max()) if score.notna().any() else 0.0
    baseline = {}
    for name, bits in dict.fromkeys(zip(series, mine.bits, strict=True)):
        base = summary[(summary["mode"] == "both") & (summary.bits == bits)] if mode == "disabled" else None
        base = summary[summary["mode"] == "float"] if base is None else base
        value = float(base.score.iloc[0]) if len(base) else math.nan
        baseline[name] = value if math.isfinite(value) else best
    return frame, baseline


def summary(analysis: "Analysis") -> "SensitivityFigure":
    """The score with nothing, weights alone, activations alone and all quantized."""
    from qlab import plots

    rows = analysis.summary[analysis.summary["mode"] != "float"]
    finite = analysis.summary.score[np.isfinite(analysis.summary.score)]
    base = float(analysis.summary.score.iloc[0]) if len(analysis.summary) else math.nan
    frame = pd.DataFrame(
        {
            "layer": rows["mode"],
            "series": [bits if bits == "as set" else f"{bits} bits" for bits in rows.bits],
            "score": rows.score.where(np.isfinite(rows.score)),
            "error": rows.change_error.where(np.isfinite(rows.change_error), rows.error),
            "note": rows.note,
        }
    )
    baseline = base if math.isfinite(base) else float(finite.max()) if len(finite) else 0.0
    return plots.sensitivity(frame, baseline=baseline, score_name=name_of(analysis))


def noise(analysis: "Analysis", limit: float = 20.0) -> "NoiseFigure":
    """The SQNR of each layer's output: all that has piled up by it, and what it adds itself."""
    from qlab import plots

    frame = analysis.noise
    sides = [
        pd.DataFrame({"layer": frame.layer, "tensor": name, "sqnr": frame[column]})
        for name, column in (("piled up", "sqnr"), ("its own", "own_sqnr"))
    ]
    return plots.noise(pd.concat(sides, ignore_index=True), limit=limit)


def estimate(analysis: "Analysis") -> "NoiseFigure":
    """The estimated SQNR of the result if one tensor alone were quantized as it is set."""
    from qlab import plots

    rows = analysis.estimate[analysis.estimate.is_set]
    return plots.noise(pd.DataFrame({"layer": rows.layer, "tensor": rows.part, "sqnr": rows.sqnr}))


def weight_ranges(sim: QuantSim, layer: str, before: pd.DataFrame | None = None) -> "RangesFigure":
    """The range of each channel of a layer's weight; `before`: `channel_ranges(sim)` from before a technique."""
    return ranges_of(channel_ranges(sim), layer, "weight", before)


def output_ranges(sim: QuantSim, layer: str, before: pd.DataFrame | None = None) -> "RangesFigure":
    """The range of each channel of a layer's output, as calibration saw it; `before` as in `weight_ranges`."""
    output = sim[layer].output
    return ranges_of(channel_ranges(sim), layer if output is None else output.name, "output", before)


def ranges_of(frame: pd.DataFrame, layer: str, part: str, before: pd.DataFrame | None = None) -> "RangesFigure":
    """The channels of one tensor out of a table of `channel_ranges`."""
    from qlab import plots

    def own(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table.layer == layer) & (table.part == part)].reset_index(drop=True)

    return plots.weight_ranges(own(frame), before=None if before is None else own(before), name=f"{layer} {part}")


def relative_ranges(
    ranges: "QuantSim | pd.DataFrame", part: str = "weight", threshold: float = 20.0
) -> "RelativeRangesFigure":
    """How the channel ranges of each layer differ; layers beyond `threshold` are flagged as problematic.

    ranges: a sim, or a table of `channel_ranges`.
    """
    from qlab import plots

    frame = channel_ranges(ranges) if isinstance(ranges, QuantSim) else ranges
    return plots.relative_ranges(frame[frame.part == part], threshold=threshold)


def histogram(sim: QuantSim, layer: str, part: str = "output", bins: int = 128) -> "HistogramFigure":
    """The values of a weight or an output, the levels of its grid and the range that clips them."""
    from qlab import plots

    quantizer = getattr(sim[layer], part)
    if quantizer is None:
        raise InputError(f"layer {layer!r} has no {part} quantizer: {sim[layer].reason or 'it has no weight'}.")
    levels, clip = _grid(quantizer)
    return plots.histogram(histogram_frame(quantizer, bins), levels=levels, clip=clip, name=f"{layer} {part}")


def noise_change(before: pd.DataFrame, after: pd.DataFrame) -> "ComparisonFigure":
    """Two tables of `layer_noise`, from before and after a change, layer by layer."""
    from qlab import plots

    both = before[["layer", "sqnr"]].merge(after[["layer", "sqnr"]], on="layer", suffixes=("_before", "_after"))
    return plots.comparison(both.rename(columns={"sqnr_before": "before", "sqnr_after": "after"}))


def picture_of(analysis: "Analysis", what: str, **options: Any) -> Any:
    """The figure called `what`; see Analysis.plot."""
    if what in ("enabled", "disabled"):
        return sensitivity(analysis, what)
    if what == "summary":
        return summary(analysis)
    if what == "noise":
        return noise(analysis, **options)
    if what == "estimate":
        return estimate(analysis)
    if what == "ranges":
        return relative_ranges(analysis.ranges, **options)
    if what == "channels":
        return ranges_of(analysis.ranges, options["layer"], options.get("part", "weight"))
    if what == "histogram":
        return stored_histogram(analysis, options["layer"], options.get("part", "output"))
    known = "'enabled', 'disabled', 'summary', 'noise', 'estimate', 'ranges', 'channels', 'histogram'"
    raise InputError(f"an analysis has the figures {known}; got {what!r}.")


def stored_histogram(analysis: "Analysis", layer: str, part: str) -> "HistogramFigure":
    """The histogram of one tensor as it was when the analysis was made, with its range."""
    from qlab import plots

    frame = analysis.histograms
    own = frame[(frame.layer == layer) & (frame.part == part)]
    ranges = analysis.ranges[(analysis.ranges.layer == layer) & (analysis.ranges.part == part)]
    low, high = ranges.grid_min.min(), ranges.grid_max.max()
    clip = (float(low), float(high)) if len(ranges) and math.isfinite(low) and math.isfinite(high) else None
    return plots.histogram(own, clip=clip, name=f"{layer} {part}")


def _grid(quantizer: Quantizer) -> tuple[pd.DataFrame | None, tuple[float, float] | None]:
    encoding = quantizer.encoding
    if encoding is None:
        return None, None
    clip = (float(encoding.minimum.min()), float(encoding.maximum.max()))
    if encoding.scale.dim() or encoding.qmax - encoding.qmin >= LEVELS:
        return None, clip
    codes = np.arange(encoding.qmin, encoding.qmax + 1, dtype=float)
    return pd.DataFrame({"value": (codes - float(encoding.zero_point)) * float(encoding.scale)}), clip


def name_of(analysis: "Analysis") -> str:
    """The name of the score, with its unit where it is dB."""
    return f"{analysis.score_name} [{analysis.score_unit}]" if analysis.score_unit == "dB" else analysis.score_name
