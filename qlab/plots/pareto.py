"""Cost against score of mixed-precision configurations: predicted, verified by a true evaluation, and the current."""

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource, Legend, LegendItem, Span

from qlab.plots import theme
from qlab.plots.columns import WrongColumns, numbers, read_frame, texts
from qlab.plots.plot import Plot

KINDS = {
    "predicted": ("circle", theme.FLOAT),
    "verified": ("diamond", theme.QUANTIZED),
    "uniform": ("square", theme.PURPLE),
    "current": ("star", theme.ORANGE),
}
_COLUMNS = ("cost", "score", "error", "kind", "label", "low", "high", "marker", "color", "fill", "size", "on_front")


def pareto(
    frame: pd.DataFrame, *, cost_name: str = "size [KiB]", score_name: str = "score", float_score: float | None = None
) -> "ParetoFigure":
    """Draw configurations by cost and score (higher is better), the best score for each cost joined by a line.

    frame: one row per configuration with `cost`, `score`, and optionally `kind` ("predicted", "verified", "uniform",
        "current"; default predicted), `error` (standard error), `label` (hover).
    float_score: drawn as a line across.
    """
    plot = ParetoFigure(cost_name=cost_name, score_name=score_name)
    plot.update(frame, float_score=float_score)
    return plot


class ParetoFigure(Plot):
    """The live front; rows of `source` are the rows of the frame, in its order, so a click is a row number:

    plot.source.selected.on_change("indices", lambda attr, old, new: apply(frame.iloc[new[0]]))
    """

    def __init__(self, *, cost_name: str = "size [KiB]", score_name: str = "score"):
        figure = theme.new_figure(cost_name, score_name, tools="pan,wheel_zoom,tap,reset,save", height=340)
        super().__init__(figure)
        self._cost_name, self._score_name = cost_name, score_name
        self.source = ColumnDataSource({column: [] for column in _COLUMNS})
        self._front = ColumnDataSource({"cost": [], "score": []})
        self._float = Span(dimension="width", line_color=theme.NEUTRAL, line_dash="dashed", line_width=1.5)
        figure.add_layout(self._float)
        line = figure.line("cost", "score", source=self._front, line_color=theme.FLOAT, line_width=1.5)
        line.glyph.line_alpha = 0.6
        figure.segment("cost", "low", "cost", "high", source=self.source, line_color="color", line_width=1.5)
        self._points = figure.scatter(
            "cost",
            "score",
            source=self.source,
            marker="marker",
            size="size",
            fill_color="fill",
            line_color="color",
            line_width=2,
            nonselection_alpha=0.45,
        )
        self._points.selection_glyph = self._points.glyph.clone(line_color=theme.ORANGE, line_width=4)
        tips = [
            ("", "@kind @label"),
            (cost_name, "@cost{0,0.[00]}"),
            (score_name, "@score{0.0000}"),
            ("± error", "@error{0.0000}"),
        ]
        theme.add_hover(figure, [self._points], tips)
        self._legend = Legend(items=[])
        theme.style_legend(self._legend)
        figure.add_layout(self._legend, "above")

    def update(self, frame: pd.DataFrame, *, float_score: float | None = None) -> None:
        """Show other configurations in place; arguments as in `pareto`."""
        frame = read_frame(frame, ("cost", "score"), "pareto")
        cost, score = numbers(frame, "cost", "pareto"), numbers(frame, "score", "pareto")
        error = numbers(frame, "error", "pareto") if "error" in frame.columns else np.full(len(frame), np.nan)
        kind = [text or "predicted" for text in texts(frame, "kind")]
        if unknown := sorted(set(kind) - set(KINDS)):
            raise WrongColumns(f"pareto knows the kinds {list(KINDS)}; column 'kind' also has {unknown}.")
        front = pareto_front(cost, score)
        self.source.data = {
            "cost": cost,
            "score": score,
            "error": error,
            "kind": kind,
            "label": texts(frame, "label"),
            "low": score - error,
            "high": score + error,
            "marker": [KINDS[name][0] for name in kind],
            "color": [KINDS[name][1] for name in kind],
            "fill": [None if name == "predicted" else KINDS[name][1] for name in kind],
            "size": np.array([{"predicted": 8.0, "current": 16.0}.get(name, 11.0) for name in kind]),
            "on_front": np.isin(np.arange(len(cost)), front),
        }
        self._front.data = {"cost": cost[front], "score": score[front]}
        self._float.location = float_score
        self._legend.items = [
            LegendItem(label={"value": name}, renderers=[self._points], index=kind.index(name))
            for name in KINDS
            if name in kind
        ]
        seen = np.isfinite(cost) & np.isfinite(score)
        if not seen.any():
            self._say("cost and score", empty="No configuration to show: the frame has no rows.")
            return
        theme.set_range(self.figure.x_range, *theme.padded(cost[seen].min(), cost[seen].max()))
        heights = np.concatenate(
            [
                score[seen],
                (score - error)[seen],
                (score + error)[seen],
                [float_score if float_score is not None else np.nan],
            ]
        )
        theme.set_range(self.figure.y_range, *theme.padded(np.nanmin(heights), np.nanmax(heights), 0.08))
        verified = kind.count("verified")
        against = f", float {float_score:.4g}" if float_score is not None else ""
        self._say(
            f"{len(cost)} configurations, {verified} verified, best {self._score_name} {score[seen].max():.4g}{against}"
        )


def pareto_front(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Rows that no other row beats in both, by rising cost.

    >>> pareto_front(np.array([3, 1, 2]), np.array([0.9, 0.5, 0.4])).tolist()
    [1, 0]
    """
    order = [i for i in np.lexsort((-score, cost)) if np.isfinite(cost[i]) and np.isfinite(score[i])]
    front, best = [], -np.inf
    for i in order:
        if score[i] > best:
            front.append(i)
            best = score[i]
    return np.array(front, dtype=int)
