"""The range of each channel of one tensor, before and after a technique."""

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource, Legend, LegendItem, Span

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame
from qlab.plots.plot import Plot

MOST_BARS = 512
GROUPS = 128


def weight_ranges(frame: pd.DataFrame, *, before: pd.DataFrame | None = None, name: str = "") -> "RangesFigure":
    """Draw a bar from min to max for each channel; `before` puts the ranges from before a technique behind them.

    frame, before: one row per channel with `channel`, `min`, `max` (of weights or activations).
    More than 512 channels are drawn in 128 groups of neighbours: a thin bar over the group's whole range, a thick one
    between the medians of its minima and maxima.
    """
    plot = RangesFigure()
    plot.update(frame, before=before, name=name)
    return plot


class RangesFigure(Plot):
    """The live ranges. Sources `now` and `before`: channel, last (of the group), min, max, low, high (thick bar), ...

    `now.selected.indices` are the clicked bars; `channels_at(indices)` are their channels.
    """

    def __init__(self) -> None:
        figure = theme.new_figure("channel", "value", tools="xpan,xwheel_zoom,tap,reset,save")
        super().__init__(figure)
        columns = ("channel", "last", "min", "max", "low", "high", "left", "right", "middle")
        self.before = ColumnDataSource({column: [] for column in columns})
        self.now = ColumnDataSource({column: [] for column in columns})
        old = figure.quad(
            "left",
            "right",
            "high",
            "low",
            source=self.before,
            fill_color=theme.SKY,
            line_color=theme.FLOAT,
            fill_alpha=0.35,
        )
        old_reach = figure.segment("middle", "min", "middle", "max", source=self.before, line_color=theme.FLOAT)
        new = figure.quad(
            "left",
            "right",
            "high",
            "low",
            source=self.now,
            fill_color=theme.QUANTIZED,
            line_color=None,
            fill_alpha=0.8,
            nonselection_fill_alpha=0.3,
        )
        reach = figure.segment("middle", "min", "middle", "max", source=self.now, line_color=theme.QUANTIZED)
        figure.add_layout(Span(location=0, dimension="width", line_color=theme.NEUTRAL, line_width=1))
        tips = [("channel", "@channel to @last"), ("min", "@min{0.0000}"), ("max", "@max{0.0000}")]
        theme.add_hover(figure, [new], tips)
        self._items = [
            LegendItem(label={"value": "before"}, renderers=[old, old_reach]),
            LegendItem(label={"value": "after"}, renderers=[new, reach]),
        ]
        self._legend = Legend(items=[])
        theme.style_legend(self._legend)
        figure.add_layout(self._legend, "above")

    def update(self, frame: pd.DataFrame, *, before: pd.DataFrame | None = None, name: str = "") -> None:
        """Show other ranges in place; arguments as in `weight_ranges`."""
        self.now.data = _bars(read_frame(frame, ("channel", "min", "max"), "weight_ranges"), 0.3)
        earlier = pd.DataFrame() if before is None else before
        self.before.data = _bars(read_frame(earlier, ("channel", "min", "max"), "weight_ranges(before=...)"), 0.48)
        self._legend.items = self._items if len(self.before.data["channel"]) else []
        count = len(frame)
        if not count:
            self._say(name or "channel ranges", empty="No channels: the frame has no rows.")
            return
        low, high = (
            np.concatenate([source.data[edge] for source in (self.now, self.before)]) for edge in ("min", "max")
        )
        if np.isfinite(low).any():
            theme.set_range(self.figure.y_range, *theme.padded(min(0, np.nanmin(low)), max(0, np.nanmax(high))))
        first, last = self.now.data["left"].min(), self.now.data["right"].max()
        theme.set_range(self.figure.x_range, *theme.padded(first, last, 0.02))
        spread = range_spread(numbers(frame, "max", "weight_ranges") - numbers(frame, "min", "weight_ranges"))
        was = f", {theme.times(_spread_of(before))} before" if before is not None and len(before) else ""
        grouped = f", in groups of {-(-count // GROUPS)}" if count > MOST_BARS else ""
        text = f"{count} channels{grouped}, widest {theme.times(spread)} the narrowest{was}"
        self._say(f"{name}: {text}" if name else text)

    def channels_at(self, indices: list[int]) -> list[int]:
        """The channels of the bars at these rows of `now`, whole groups where bars are groups."""
        data = self.now.data
        return [channel for i in indices for channel in range(int(data["channel"][i]), int(data["last"][i]) + 1)]


def range_spread(widths: np.ndarray) -> float:
    """How many times the widest range is as wide as the narrowest that is not zero; 1 where nothing can differ.

    >>> range_spread(np.array([0.5, 2.0, 0.0]))
    4.0
    """
    widths = widths[np.isfinite(widths) & (widths > 0)]
    return float(widths.max() / widths.min()) if len(widths) else 1.0


def _spread_of(frame: pd.DataFrame) -> float:
    where = "weight_ranges(before=...)"
    return range_spread(numbers(frame, "max", where) - numbers(frame, "min", where))


def _bars(frame: pd.DataFrame, half: float) -> dict[str, np.ndarray]:
    """One bar per channel, or per group of neighbours; `half` is half a bar's width in channels of the group."""
    channel, low, high = (numbers(frame, column, "weight_ranges") for column in ("channel", "min", "max"))
    if len(frame) <= MOST_BARS:
        edges = {"left": channel - half, "right": channel + half, "middle": channel}
        return dict(channel=channel, last=channel, min=low, max=high, low=low, high=high, **edges)
    size = -(-len(frame) // GROUPS)
    groups = pd.DataFrame({"channel": channel, "min": low, "max": high}).groupby(np.arange(len(frame)) // size)
    first, last = (groups.channel.min().to_numpy(), groups.channel.max().to_numpy())
    middle, reach = (first + last) / 2, (last - first + 1) * half
    return {
        "channel": first,
        "last": last,
        "min": groups["min"].min().to_numpy(),
        "max": groups["max"].max().to_numpy(),
        "low": groups["min"].median().to_numpy(),
        "high": groups["max"].median().to_numpy(),
        "left": middle - reach,
        "right": middle + reach,
        "middle": middle,
    }
