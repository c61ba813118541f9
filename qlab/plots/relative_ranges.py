"""Which layers have channels of very different ranges: those that one scale per tensor serves badly."""

import numpy as np
import pandas as pd

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame, texts
from qlab.plots.layer_rows import LayerRows
from qlab.plots.ranges import range_spread

_COLUMNS = ("layer", "channels", "spread", "verdict", "narrowest", "quarter", "median", "three_quarters", "widest")
_DRAWN = ("row", "top", "bottom", "color", "marker")


def relative_ranges(frame: pd.DataFrame, *, threshold: float = 20.0) -> "RelativeRangesFigure":
    """Draw how the channel ranges of each layer spread, and flag layers whose ranges differ by more than `threshold`.

    frame: one row per layer and channel with `layer`, `channel`, `min`, `max`.
    Per layer a thin line from the narrowest to the widest channel range (zero ranges left out), a box over the middle
    half and a mark at the median, on a logarithmic axis; the spread is widest / narrowest.
    """
    plot = RelativeRangesFigure(threshold=threshold)
    plot.update(frame)
    return plot


class RelativeRangesFigure(LayerRows):
    """The live picture. Source columns: `narrowest`, `quarter`, `median`, `three_quarters`, `widest` channel range as
    measured, `log_...` of each as drawn (log10), `spread`, `verdict`."""

    def __init__(self, *, threshold: float = 20.0):
        logs = [f"log_{name}" for name in _COLUMNS[4:]]
        super().__init__("channel range (max - min)", [*_COLUMNS, *logs, *_DRAWN])
        self._threshold = threshold
        figure = self.figure
        theme.log_ticks(figure.xaxis[0], is_log=True)
        dim = {"nonselection_fill_alpha": 0.3, "nonselection_line_alpha": 0.3}
        figure.segment(
            "log_narrowest",
            "row",
            "log_widest",
            "row",
            source=self.source,
            line_color="color",
            line_width=2,
            nonselection_line_alpha=0.3,
        )
        boxes = figure.quad(
            "log_quarter",
            "log_three_quarters",
            "top",
            "bottom",
            source=self.source,
            fill_color="color",
            line_color="color",
            fill_alpha=0.6,
            **dim,
        )
        self._marks = figure.scatter(
            "log_widest",
            "row",
            source=self.source,
            marker="marker",
            size=9,
            fill_color="color",
            line_color="color",
            **dim,
        )
        figure.scatter("log_median", "row", source=self.source, size=5, fill_color=theme.LIGHT_INK, line_color="color")
        tips = [
            ("layer", "@layer"),
            ("channels", "@channels"),
            ("spread", "@spread{0.0}×"),
            ("", "@verdict"),
            ("narrowest", "@narrowest{0.00000}"),
            ("median", "@median{0.00000}"),
            ("widest", "@widest{0.00000}"),
        ]
        theme.add_hover(figure, [boxes, self._marks], tips)

    def update(self, frame: pd.DataFrame) -> None:
        """Show other ranges in place; the frame as in `relative_ranges`."""
        frame = read_frame(frame, ("layer", "channel", "min", "max"), "relative_ranges")
        chosen = self.layers_at(self.source.selected.indices)
        widths = numbers(frame, "max", "relative_ranges") - numbers(frame, "min", "relative_ranges")
        by_layer = pd.DataFrame({"layer": texts(frame, "layer"), "width": widths}).groupby("layer", sort=False).width
        names = [name for name, _ in by_layer]
        rows = [_summary(group.to_numpy()) for _, group in by_layer]
        data = {
            column: np.array([row[i] for row in rows], dtype=float)
            for i, column in enumerate(("channels", "spread", *_COLUMNS[4:]))
        }
        is_flagged = data["spread"] > self._threshold
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = {f"log_{column}": np.log10(data[column]) for column in _COLUMNS[4:]}
        row = np.arange(len(names), dtype=float)
        self.source.data = dict(
            layer=names,
            **data,
            **logs,
            row=row,
            top=row - 0.3,
            bottom=row + 0.3,
            verdict=[f"ranges differ by more than {self._threshold:g}×" if flag else "" for flag in is_flagged],
            color=[theme.QUANTIZED if flag else theme.FLOAT for flag in is_flagged],
            marker=["triangle" if flag else "circle" for flag in is_flagged],
        )
        self._set_rows(names)
        self.select(chosen)
        first = [next((i for i, flag in enumerate(is_flagged) if flag == wanted), None) for wanted in (True, False)]
        labels = (f"ranges differ by more than {self._threshold:g}×", "ranges alike")
        self._set_legend([(label, [self._marks], i) for label, i in zip(labels, first, strict=True) if i is not None])
        extent = np.concatenate([logs["log_narrowest"], logs["log_widest"]])
        extent = extent[np.isfinite(extent)]
        if len(extent):
            theme.set_range(self.figure.x_range, *theme.padded(extent.min(), extent.max()))
        if not names:
            self._say("channel ranges by layer", empty="No channels: the frame has no rows.")
            return
        worst = int(np.argmax(data["spread"]))
        self._say(
            f"{int(is_flagged.sum())} of {len(names)} layers differ by more than {self._threshold:g}×, "
            f"most {theme.elide(names[worst], 40)} ({theme.times(data['spread'][worst])}){self._more_rows()}"
        )


def _summary(widths: np.ndarray) -> tuple[float, ...]:
    """channels, spread, and the five numbers of the ranges that are not zero (NaN without any)."""
    shown = widths[np.isfinite(widths) & (widths > 0)]
    five = np.quantile(shown, (0, 0.25, 0.5, 0.75, 1)) if len(shown) else np.full(5, np.nan)
    return (len(widths), range_spread(widths), *five)
