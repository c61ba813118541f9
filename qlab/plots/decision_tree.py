"""What AutoQuant tried, as a tree: each stage under the one it started from, with score, gain and verdict."""

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame, texts
from qlab.plots.layered_layout import layered_layout
from qlab.plots.plot import Plot

# shape, ink: a verdict is read from its word and its shape as well as from its colour
VERDICTS = {
    "target met": ("star", theme.FLOAT),
    "effective": ("circle", theme.FLOAT),
    "discarded": ("x", theme.NEUTRAL),
    "failed": ("triangle", theme.QUANTIZED),
    "vetoed": ("inverted_triangle", theme.PURPLE),
    "forced": ("diamond", theme.PURPLE),
    "running": ("hex", theme.ORANGE),
}
KEPT = ("target met", "effective", "forced")
_OTHER = ("square", theme.NEUTRAL)
ROW_HEIGHT = 74


def decision_tree(
    frame: pd.DataFrame, *, score_name: str = "score", target: float | None = None
) -> "DecisionTreeFigure":
    """Draw stages as boxes from the first at the top, joined to the stage that each builds on.

    frame: one row per stage with `stage` (unique), `parent` (a stage, or missing for a start), `score` (NaN: none),
        `verdict`, and optionally `gain`, `seconds`, `reason` (hover), `is_best` (the stages that lead to the result).
    """
    plot = DecisionTreeFigure(score_name=score_name)
    plot.update(frame, target=target)
    return plot


class DecisionTreeFigure(Plot):
    """The live tree; `update` with a longer frame while AutoQuant runs. Source rows are the frame's rows."""

    def __init__(self, *, score_name: str = "score"):
        figure = theme.new_figure("", "", tools="pan,wheel_zoom,tap,reset,save")
        super().__init__(figure)
        figure.axis.visible = False
        figure.grid.visible = False
        self._score_name = score_name
        self.edges = ColumnDataSource({column: [] for column in ("x0", "y0", "x1", "y1", "color")})
        columns = ("stage", "parent", "score", "verdict", "gain", "seconds", "reason", "x", "y", "color", "marker")
        drawn = ("left", "right", "top", "bottom", "line", "name", "text", "mark_x")
        self.source = ColumnDataSource({column: [] for column in (*columns, *drawn)})
        figure.segment("x0", "y0", "x1", "y1", source=self.edges, line_color="color", line_width=2)
        boxes = figure.quad(
            "left",
            "right",
            "top",
            "bottom",
            source=self.source,
            fill_color="color",
            fill_alpha=0.12,
            line_color="line",
            line_width=2,
            nonselection_fill_alpha=0.06,
        )
        boxes.selection_glyph = boxes.glyph.clone(fill_alpha=0.3, line_width=4)
        marks = figure.scatter(
            "mark_x",
            "y",
            source=self.source,
            marker="marker",
            size=12,
            fill_color="color",
            line_color="color",
            line_width=2,
        )
        ink = {
            "source": self.source,
            "text_color": theme.NEUTRAL,
            "text_font": {"value": theme.FONT},
            "text_align": "center",
        }
        figure.text(
            "x", "y", text="name", y_offset=-5, text_font_size="12px", text_font_style="bold", x_offset=8, **ink
        )
        figure.text("x", "y", text="text", y_offset=12, text_font_size="11px", x_offset=8, **ink)
        tips = [
            ("stage", "@stage"),
            ("verdict", "@verdict"),
            (score_name, "@score{0.0000}"),
            ("gain", "@gain{+0.0000}"),
            ("seconds", "@seconds{0.0}"),
            ("why", "@reason"),
        ]
        theme.add_hover(figure, [boxes, marks], tips)

    def update(self, frame: pd.DataFrame, *, target: float | None = None) -> None:
        """Show other stages in place; arguments as in `decision_tree`."""
        where = "decision_tree"
        frame = read_frame(frame, ("stage", "parent", "score", "verdict"), where)
        stage, parent, verdict, reason = (texts(frame, column) for column in ("stage", "parent", "verdict", "reason"))
        score, gain, seconds = (
            numbers(frame, column, where) if column in frame.columns else np.full(len(frame), np.nan)
            for column in ("score", "gain", "seconds")
        )
        is_best = (
            frame["is_best"].fillna(False).astype(bool).tolist() if "is_best" in frame.columns else [False] * len(stage)
        )
        joined = [(above, name) for above, name in zip(parent, stage, strict=True) if above]
        placed = layered_layout(stage, joined)
        x, y = placed.y.to_numpy(), -placed.x.to_numpy()  # depth runs down
        looks = [VERDICTS.get(word, _OTHER) for word in verdict]
        span = max(x.max() - x.min() + 1, 2.6) if len(x) else 1.0  # a lone column of boxes does not fill the width
        letters = int((theme.WIDTH - 40) / span * 0.9 / 6.6) - 3
        self.source.data = {
            "stage": stage,
            "parent": parent,
            "score": score,
            "verdict": verdict,
            "gain": gain,
            "seconds": seconds,
            "reason": reason,
            "x": x,
            "y": y,
            "color": [ink for _, ink in looks],
            "marker": [shape for shape, _ in looks],
            "left": x - 0.46,
            "right": x + 0.46,
            "top": y + 0.36,
            "bottom": y - 0.36,
            "mark_x": x - 0.46 + 16 / ((theme.WIDTH - 40) / span),
            "line": [theme.ORANGE if best else ink for best, (_, ink) in zip(is_best, looks, strict=True)],
            "name": [theme.elide(name, max(letters, 3)) for name in stage],
            "text": [theme.elide(_line(*row), max(letters, 3)) for row in zip(score, gain, verdict, strict=True)],
        }
        at = {name: i for i, name in enumerate(stage)}
        ends = [(at[above], at[name]) for above, name in joined]
        best_edge = [is_best[i] and is_best[j] for i, j in ends]
        self.edges.data = {
            "x0": [x[i] for i, _ in ends],
            "y0": [y[i] - 0.36 for i, _ in ends],
            "x1": [x[j] for _, j in ends],
            "y1": [y[j] + 0.36 for _, j in ends],
            "color": [theme.ORANGE if best else theme.NEUTRAL for best in best_edge],
        }
        if not stage:
            self._say("stages", empty="No stage has run yet.")
            return
        middle = (x.max() + x.min()) / 2
        theme.set_range(self.figure.x_range, middle - span / 2, middle + span / 2)
        theme.set_range(self.figure.y_range, y.min() - 0.5, y.max() + 0.5)
        self.figure.height = int(50 + ROW_HEIGHT * (y.max() - y.min() + 1))
        kept = [value for value, word in zip(score, verdict, strict=True) if word in KEPT and np.isfinite(value)]
        best = f"best {self._score_name} {max(kept):.4g}" if kept else "none kept yet"
        wanted = f", target {target:.4g}" if target is not None else ""
        self._say(f"{len(stage)} stages, {best}{wanted}")


def _line(score: float, gain: float, verdict: str) -> str:
    parts = [f"{score:.4f}" if np.isfinite(score) else "", f"({gain:+.4f})" if np.isfinite(gain) else "", verdict]
    return " ".join(part for part in parts if part)
