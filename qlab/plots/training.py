"""Curves over training steps: loss and score of a run, and the range of one layer with the share it clips."""

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource, Legend, LegendItem, LinearAxis, Range1d
from bokeh.plotting import figure as BokehFigure

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame
from qlab.plots.plot import Plot


def training(frame: pd.DataFrame, *, score_name: str = "score", float_score: float | None = None) -> "TrainingFigure":
    """Draw loss (left axis) and validation score (right axis) over steps.

    frame: one row per step with `step`, `loss`, and optionally `score`; either is NaN where it was not measured.
    float_score: the float model's score, in the title to compare with.
    """
    plot = TrainingFigure(score_name=score_name)
    plot.update(frame, float_score=float_score)
    return plot


def range_history(frame: pd.DataFrame, *, name: str = "") -> "RangeHistoryFigure":
    """Draw how a layer's range moved in training, and the share of values outside it.

    frame: one row per step with `step`, `low`, `high` (the range), and optionally `clipped` (share, 0 to 1).
    """
    plot = RangeHistoryFigure()
    plot.update(frame, name=name)
    return plot


class TrainingFigure(Plot):
    """The live curves: source `steps` (step, loss), source `scores` (step, score)."""

    def __init__(self, *, score_name: str = "score"):
        figure = theme.new_figure("step", "loss", extra_y_ranges={"score": Range1d(0, 1)})
        super().__init__(figure)
        self._score_name = score_name
        self.steps = ColumnDataSource({"step": [], "loss": []})
        self.scores = ColumnDataSource({"step": [], "score": []})
        loss = figure.line("step", "loss", source=self.steps, line_color=theme.FLOAT, line_width=2)
        line = figure.line(
            "step",
            "score",
            source=self.scores,
            y_range_name="score",
            line_color=theme.QUANTIZED,
            line_dash="dashed",
            line_width=2,
        )
        dots = figure.scatter(
            "step", "score", source=self.scores, y_range_name="score", marker="diamond", size=10, color=theme.QUANTIZED
        )
        self._axis = _right_axis(figure, "score", score_name)
        theme.add_hover(figure, [loss], [("step", "@step"), ("loss", "@loss{0.0000}")])
        theme.add_hover(figure, [dots], [("step", "@step"), (score_name, "@score{0.0000}")])
        self._items = [
            LegendItem(label={"value": "loss"}, renderers=[loss]),
            LegendItem(label={"value": score_name}, renderers=[dots, line]),
        ]
        self._legend = _legend(figure)

    def update(self, frame: pd.DataFrame, *, float_score: float | None = None) -> None:
        """Show more or other steps in place; arguments as in `training`."""
        frame = read_frame(frame, ("step", "loss"), "training")
        step, loss = numbers(frame, "step", "training"), numbers(frame, "loss", "training")
        score = numbers(frame, "score", "training") if "score" in frame.columns else np.full(len(frame), np.nan)
        is_measured, is_step = np.isfinite(score), ~np.isnan(loss)
        self.steps.data = {"step": step[is_step], "loss": loss[is_step]}
        self.scores.data = {"step": step[is_measured], "score": score[is_measured]}
        self._axis.visible = bool(is_measured.any())
        self._legend.items = self._items if is_measured.any() else []
        if not len(step):
            self._say("training", empty="No step was taken yet.")
            return
        _fit(self.figure.x_range, step, 0.02)
        _fit(self.figure.y_range, loss)
        _fit(self.figure.extra_y_ranges["score"], score, 0.1)
        best = f", best {self._score_name} {np.nanmax(score):.4g}" if is_measured.any() else ""
        against = f" (float {float_score:.4g})" if float_score is not None else ""
        last = f"loss {loss[is_step][-1]:.4g}" if is_step.any() else "no loss"
        self._say(f"step {step[-1]:g}: {last}{best}{against}")


class RangeHistoryFigure(Plot):
    """The live band: source `steps` (step, low, high, clipped)."""

    def __init__(self) -> None:
        figure = theme.new_figure("step", "range", extra_y_ranges={"clipped": Range1d(0, 1)})
        super().__init__(figure)
        self.steps = ColumnDataSource({"step": [], "low": [], "high": [], "clipped": []})
        band = figure.varea("step", "low", "high", source=self.steps, fill_color=theme.ORANGE, fill_alpha=0.3)
        edges = [
            figure.line("step", edge, source=self.steps, line_color=theme.ORANGE, line_width=2)
            for edge in ("low", "high")
        ]
        share = figure.line(
            "step",
            "clipped",
            source=self.steps,
            y_range_name="clipped",
            line_color=theme.PURPLE,
            line_width=2,
            line_dash="dashed",
        )
        self._axis = _right_axis(figure, "clipped", "clipped [%]")
        tips = [("step", "@step"), ("range", "@low{0.0000} to @high{0.0000}"), ("clipped", "@clipped{0.000} %")]
        theme.add_hover(figure, edges, tips)
        self._items = [
            LegendItem(label={"value": "range"}, renderers=[band]),
            LegendItem(label={"value": "clipped share"}, renderers=[share]),
        ]
        self._legend = _legend(figure)

    def update(self, frame: pd.DataFrame, *, name: str = "") -> None:
        """Show more or other steps in place; arguments as in `range_history`. The source holds `clipped` in percent."""
        where = "range_history"
        frame = read_frame(frame, ("step", "low", "high"), where)
        step, low, high = (numbers(frame, column, where) for column in ("step", "low", "high"))
        clipped = numbers(frame, "clipped", where) * 100 if "clipped" in frame.columns else np.full(len(frame), np.nan)
        self.steps.data = {"step": step, "low": low, "high": high, "clipped": clipped}
        self._axis.visible = bool(np.isfinite(clipped).any())
        self._legend.items = self._items if self._axis.visible else []
        if not len(step):
            self._say(name or "range", empty="No step was taken yet.")
            return
        _fit(self.figure.x_range, step, 0.02)
        _fit(self.figure.y_range, np.concatenate([low, high]))
        if self._axis.visible:
            theme.set_range(self.figure.extra_y_ranges["clipped"], 0, np.nanmax(clipped) * 1.2 or 1.0)
        share = f", clips {clipped[-1]:.3g} %" if np.isfinite(clipped[-1]) else ""
        text = f"range [{low[-1]:.4g}, {high[-1]:.4g}]{share} at step {step[-1]:g}"
        self._say(f"{name}: {text}" if name else text)


def _right_axis(figure: BokehFigure, range_name: str, label: str) -> LinearAxis:
    axis = LinearAxis(y_range_name=range_name, axis_label=label, visible=False)
    theme.style_axis(axis)
    figure.add_layout(axis, "right")
    return axis


def _legend(figure: BokehFigure) -> Legend:
    legend = Legend(items=[])
    theme.style_legend(legend)
    figure.add_layout(legend, "above")
    return legend


def _fit(axis_range: Range1d, values: np.ndarray, share: float = 0.05) -> None:
    finite = values[np.isfinite(values)]
    if len(finite):
        theme.set_range(axis_range, *theme.padded(finite.min(), finite.max(), share))
