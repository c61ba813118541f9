"""One value per layer before and after a change, as dumbbells: what a technique moved, and which way."""

import numpy as np
import pandas as pd

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame, texts
from qlab.plots.layer_rows import LayerRows

_COLUMNS = ("layer", "before", "after", "change", "row", "color", "marker")


def comparison(
    frame: pd.DataFrame,
    *,
    value_name: str = "SQNR [dB]",
    names: tuple[str, str] = ("before", "after"),
    higher_is_better: bool = True,
) -> "ComparisonFigure":
    """Draw each layer's value before (ring) and after (diamond; triangle where worse) with a line between.

    frame: one row per layer with `layer`, `before`, `after`, in the order to show.
    """
    plot = ComparisonFigure(value_name=value_name, names=names, higher_is_better=higher_is_better)
    plot.update(frame)
    return plot


class ComparisonFigure(LayerRows):
    """The live dumbbells. Source columns beside those given: `change` (after - before), `row`."""

    def __init__(
        self,
        *,
        value_name: str = "SQNR [dB]",
        names: tuple[str, str] = ("before", "after"),
        higher_is_better: bool = True,
    ):
        super().__init__(value_name, _COLUMNS)
        self._better = 1 if higher_is_better else -1
        self._names = names
        figure = self.figure
        lines = figure.segment("before", "row", "after", "row", source=self.source, line_color="color", line_width=3)
        lines.glyph.line_alpha = 0.6
        before = figure.scatter(
            "before",
            "row",
            source=self.source,
            size=9,
            fill_color=None,
            line_color=theme.NEUTRAL,
            line_width=2,
            nonselection_alpha=0.3,
        )
        after = figure.scatter(
            "after",
            "row",
            source=self.source,
            marker="marker",
            size=11,
            fill_color="color",
            line_color="color",
            nonselection_alpha=0.3,
        )
        self._marks = [before, after]
        tips = [
            ("layer", "@layer"),
            (names[0], "@before{0.0000}"),
            (names[1], "@after{0.0000}"),
            ("change", "@change{+0.0000}"),
        ]
        theme.add_hover(figure, [before, after], tips)

    def update(self, frame: pd.DataFrame) -> None:
        """Show other values in place; the frame as in `comparison`."""
        frame = read_frame(frame, ("layer", "before", "after"), "comparison")
        chosen = self.layers_at(self.source.selected.indices)
        layer = texts(frame, "layer")
        before, after = (numbers(frame, column, "comparison") for column in ("before", "after"))
        change = after - before
        is_worse = change * self._better < 0
        self.source.data = {
            "layer": layer,
            "before": before,
            "after": after,
            "change": change,
            "row": np.arange(len(layer), dtype=float),
            "color": [theme.QUANTIZED if worse else theme.FLOAT for worse in is_worse],
            "marker": ["inverted_triangle" if worse else "diamond" for worse in is_worse],
        }
        self._set_rows(layer)
        self.select(chosen)
        if not layer:
            self._say("before and after", empty="Nothing to compare: the frame has no rows.")
            return
        first = [next((i for i, worse in enumerate(is_worse) if worse == wanted), None) for wanted in (False, True)]
        ends = [
            (f"{self._names[1]}, {word}", [self._marks[1]], i)
            for word, i in zip(("better or equal", "worse"), first, strict=True)
            if i is not None
        ]
        self._set_legend([(self._names[0], [self._marks[0]], 0), *ends])
        extent = np.concatenate([before, after])
        extent = extent[np.isfinite(extent)]
        if len(extent):
            theme.set_range(self.figure.x_range, *theme.padded(extent.min(), extent.max()))
        better = int((change * self._better > 0).sum())
        self._say(f"{better} layers better, {int(is_worse.sum())} worse, of {len(layer)}{self._more_rows()}")
