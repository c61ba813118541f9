"""The values of one tensor before and after quantization, the integer grid, and the range that clips them."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from bokeh.models import BoxAnnotation, ColumnDataSource, Legend, LegendItem, LinearAxis, Range1d

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame
from qlab.plots.plot import Plot

IMPULSE_LEVELS = 64  # up to here each level is drawn on its own; more become a step line and a thinned grid
DRAWN_LEVELS = 1024


def histogram(
    frame: pd.DataFrame,
    *,
    levels: pd.DataFrame | None = None,
    clip: tuple[float, float] | None = None,
    clipped: float | None = None,
    error: pd.DataFrame | None = None,
    name: str = "",
    counts: str = "linear",
) -> "HistogramFigure":
    """Draw a tensor's histogram, its quantized values over it, the grid and the clip lines.

    frame: one row per bin with `left`, `right`, `count`.
    levels: one row per grid point with `value` and, once known, `count` of values that round to it. Counts per level
        are drawn at the height that gives both histograms the same area; hover shows the counts themselves.
    clip: the range (low, high) that the grid covers.
    clipped: the share of values outside it, where it is known; else it is estimated from the bins.
    error: the error as a function of the upper clip line: `clip`, `error` (any unit), drawn on an axis of its own.
    counts: "linear" or "log".
    """
    plot = HistogramFigure(counts=counts)
    plot.update(frame, levels=levels, clip=clip, clipped=clipped, error=error, name=name)
    return plot


class HistogramFigure(Plot):
    """The live histogram. A person drags the edges of `clip`, a view listens:

        plot.clip.on_change("left", moved); plot.clip.on_change("right", moved)

    and answers with `update(..., clip=None)`, which leaves the lines where they are being dragged.
    Sources: `bins` (left, right, count, top, base), `levels` (value, count, top, base), `grid` (value), `error`.
    """

    def __init__(self, *, counts: str = "linear"):
        figure = theme.new_figure("value", "count", extra_y_ranges={"error": Range1d(0, 1)})
        super().__init__(figure)
        self.bins = ColumnDataSource({"left": [], "right": [], "count": [], "top": [], "base": []})
        self.levels = ColumnDataSource({"value": [], "count": [], "top": [], "base": []})
        self.grid = ColumnDataSource({"value": [], "base": []})
        self.error = ColumnDataSource({"clip": [], "error": []})
        bars = figure.quad("left", "right", "top", "base", source=self.bins, color=theme.FLOAT, alpha=0.75)
        self._bars = bars.glyph
        self._impulses = figure.segment(
            "value", "base", "value", "top", source=self.levels, line_color=theme.QUANTIZED, line_width=2
        )
        self._heads = figure.scatter("value", "top", source=self.levels, size=6, color=theme.QUANTIZED)
        self._steps = figure.step(
            "value", "top", source=self.levels, mode="center", line_color=theme.QUANTIZED, line_width=1.5
        )
        ticks = figure.scatter(
            "value",
            "base",
            source=self.grid,
            marker="dash",
            angle=np.pi / 2,
            size=9,
            fill_color=None,
            line_color=theme.QUANTIZED,
        )
        curve = figure.line(
            "clip",
            "error",
            source=self.error,
            line_color=theme.PURPLE,
            line_width=2,
            line_dash="dashed",
            y_range_name="error",
        )
        self._error_axis = LinearAxis(y_range_name="error", axis_label="error", visible=False)
        theme.style_axis(self._error_axis)
        figure.add_layout(self._error_axis, "right")
        self._add_clip()
        self._items = [
            LegendItem(label={"value": "float"}, renderers=[bars]),
            LegendItem(label={"value": "quantized"}, renderers=[self._heads, self._impulses, self._steps]),
            LegendItem(label={"value": "integer grid"}, renderers=[ticks]),
            LegendItem(label={"value": "error if clipped here"}, renderers=[curve]),
        ]
        self._legend = Legend(items=[])
        theme.style_legend(self._legend)
        figure.add_layout(self._legend, "above")
        theme.add_hover(figure, [bars], [("values", "@left{0.0000} to @right{0.0000}"), ("count", "@count{0,0}")])
        theme.add_hover(figure, [self._heads], [("grid point", "@value{0.0000}"), ("count", "@count{0,0}")])
        self._name, self._level_scale = "", 1.0
        self._clipped: float | None = None
        self.set_counts(counts)

    def update(
        self,
        frame: pd.DataFrame,
        *,
        levels: pd.DataFrame | None = None,
        clip: tuple[float, float] | None = None,
        clipped: float | None = None,
        error: pd.DataFrame | None = None,
        name: str = "",
    ) -> None:
        """Show other data in place; arguments as in `histogram`. Without `clip` the clip lines stay."""
        frame = read_frame(frame, ("left", "right", "count"), "histogram")
        left, right, count = (numbers(frame, column, "histogram") for column in ("left", "right", "count"))
        self._name, self._clipped = name, clipped
        bin_width = float(np.median(right - left)) if len(left) else 1.0
        self._bars.line_color = None if bin_width else theme.FLOAT  # a constant's bin has an outline only
        self._set_levels(levels, bin_width)
        self._set_error(error)
        self.bins.data = dict(left=left, right=right, count=count, **self._heights(count, 1.0))
        self._set_top()
        sources = (count, self.levels.data["value"], self.grid.data["value"], self.error.data["clip"])
        self._legend.items = [item for item, rows in zip(self._items, sources, strict=True) if len(rows)]
        if clip is not None:
            self.clip.update(left=float(clip[0]), right=float(clip[1]), visible=True)
            self._below.update(right=self.clip.left, visible=True)
            self._above.update(left=self.clip.right, visible=True)
        edges = [*left[:1], *right[-1:], *(clip or ())]
        is_dragged = clip is None and self.clip.visible  # the axis must not move under the hand
        if edges and not is_dragged:
            theme.set_range(self.figure.x_range, *theme.padded(min(edges), max(edges), 0.03))
        self._say_headline()

    def move_clip(self, low: float, high: float) -> None:
        """Move the clip lines and the share in the title, nothing else."""
        self.clip.update(left=low, right=high, visible=True)
        self._below.update(right=low, visible=True)
        self._above.update(left=high, visible=True)
        self._clipped = None
        self._say_headline()

    def set_counts(self, counts: str) -> None:
        """Draw counts on a "linear" or a "log" axis."""
        if counts not in ("linear", "log"):
            raise ValueError(f"counts is 'linear' or 'log', not {counts!r}.")
        self._counts = counts
        self._floor = float(np.log10(0.5)) if counts == "log" else 0.0
        theme.log_ticks(self.figure.yaxis[0], is_log=counts == "log")
        for source, scale in ((self.bins, 1.0), (self.levels, self._level_scale)):
            source.data = dict(source.data) | self._heights(source.data["count"], scale)
        self._set_top()

    def _add_clip(self) -> None:
        shade = {
            "fill_color": theme.NEUTRAL,
            "fill_alpha": 0.12,
            "line_color": None,
            "hatch_pattern": "/",
            "visible": False,
        }
        shade |= {"hatch_color": theme.NEUTRAL, "hatch_alpha": 0.35, "hatch_scale": 8, "hatch_weight": 0.5}
        self._below, self._above = BoxAnnotation(**shade), BoxAnnotation(**shade)
        self.clip = BoxAnnotation(
            left=0.0,
            right=1.0,
            visible=False,
            editable=True,
            movable="none",
            resizable="x",
            fill_alpha=0,
            line_color=theme.ORANGE,
            line_alpha=1.0,
            line_width=2,
            line_dash="dashed",
            hover_line_color=theme.ORANGE,
            hover_line_alpha=1.0,
            hover_line_width=3,
            hover_line_dash="dashed",
            hover_fill_alpha=0,
        )
        self.clip.js_link("left", self._below, "right")
        self.clip.js_link("right", self._above, "left")
        for item in (self._below, self._above, self.clip):
            self.figure.add_layout(item)

    def _set_levels(self, levels: pd.DataFrame | None, bin_width: float) -> None:
        where = "histogram(levels=...)"
        levels = read_frame(levels if levels is not None else pd.DataFrame(), ("value",), where)
        value = numbers(levels, "value", where)
        grid = thinned(value)
        self.grid.data = {"value": grid, "base": np.full(len(grid), self._floor)}
        count = numbers(levels, "count", where) if "count" in levels.columns else np.empty(0)
        value, count = merged(value[: len(count)], count, DRAWN_LEVELS)
        step = float(np.median(np.diff(value))) if len(value) > 1 else 0.0
        self._level_scale = bin_width / step if bin_width and step else 1.0
        self.levels.data = dict(value=value, count=count, **self._heights(count, self._level_scale))
        self._impulses.visible = self._heads.visible = len(value) <= IMPULSE_LEVELS
        self._steps.visible = not self._heads.visible

    def _set_error(self, error: pd.DataFrame | None) -> None:
        error = read_frame(error if error is not None else pd.DataFrame(), ("clip", "error"), "histogram(error=...)")
        place, height = (numbers(error, column, "histogram(error=...)") for column in ("clip", "error"))
        self.error.data = {"clip": place, "error": height}
        self._error_axis.visible = bool(len(place))
        if len(place):
            theme.set_range(self.figure.extra_y_ranges["error"], 0, np.nanmax(height) * 1.08)

    def _heights(self, count: np.ndarray, scale: float) -> dict[str, np.ndarray]:
        """The drawn heights: scaled counts, or log10 of them down to half a value."""
        top = np.asarray(count, dtype=float) * scale
        if self._counts == "log":
            top = np.log10(np.maximum(top, 0.5))
        return {"top": top, "base": np.full(len(top), self._floor)}

    def _set_top(self) -> None:
        highest = max(
            (float(np.max(s.data["top"])) for s in (self.bins, self.levels) if len(s.data["top"])), default=1.0
        )
        room = (highest - self._floor) * 0.04
        grid = self.grid.data["value"]
        self.grid.data = {"value": grid, "base": np.full(len(grid), self._floor)}
        theme.set_range(self.figure.y_range, self._floor - room, highest + 2 * room)

    def _say_headline(self) -> None:
        count = np.asarray(self.bins.data["count"], dtype=float)
        if not len(count):
            self._say(self._name or "histogram", empty="No values yet: calibrate with at least one batch.")
            return
        parts = [f"{count.sum():,.0f} values"]
        if self.clip.visible:
            share = self._clipped
            if share is None:
                share = clipped_share(self.bins.data, self.clip.left, self.clip.right)
            parts.append(f"range [{self.clip.left:.4g}, {self.clip.right:.4g}] clips {share:.2%}")
        self._say(": ".join([self._name, ", ".join(parts)]) if self._name else ", ".join(parts))


def clipped_share(bins: Mapping, low: float, high: float) -> float:
    """Return the share of values outside [low, high]; a bin that the edge crosses counts in part.

    >>> clipped_share({"left": [0, 1], "right": [1, 2], "count": [3, 1]}, 0.0, 1.5)
    0.125
    """
    left, right, count = (np.asarray(bins[column], dtype=float) for column in ("left", "right", "count"))
    kept = np.clip(np.minimum(right, high) - np.maximum(left, low), 0, None) / np.maximum(right - left, 1e-300)
    inside = np.where(right > left, kept, (left >= low) & (left <= high))
    return float(1 - (count * inside).sum() / count.sum()) if count.sum() else 0.0


def thinned(grid: np.ndarray, most: int = IMPULSE_LEVELS) -> np.ndarray:
    """Keep every 2^k-th grid point so that at most `most` remain, zero among them where it was.

    >>> thinned(np.arange(-4.0, 4.0), most=4)
    array([-4., -2.,  0.,  2.])
    """
    step = 1
    while len(grid) > most * step:
        step *= 2
    zero = int(np.argmin(np.abs(grid))) if len(grid) else 0
    return grid[zero % step :: step]


def merged(value: np.ndarray, count: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Add up neighbouring levels until at most `most` remain (16-bit grids have 65,536)."""
    size = -(-len(value) // most) if len(value) > most else 1
    starts = np.arange(0, len(value), size)
    if size == 1:
        return value, count
    return np.add.reduceat(value, starts) / np.diff([*starts, len(value)]), np.add.reduceat(count, starts)
