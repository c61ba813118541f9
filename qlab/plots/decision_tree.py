"""What AutoQuant tried, as a tree: each stage a row under the one it started from, with score, gain and verdict."""

import numpy as np
import pandas as pd
from bokeh.models import ColumnDataSource

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame, texts
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
ROW_HEIGHT = 30
_INDENT = 26  # px a level, of a figure as wide as it may get
_LETTERS = 38  # of a name: what leaves room for score and verdict in a narrow pane


def decision_tree(
    frame: pd.DataFrame, *, score_name: str = "score", target: float | None = None
) -> "DecisionTreeFigure":
    """Draw stages as rows, each indented under the stage that it builds on and joined to it, in order.

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
            "text_baseline": "middle",
        }
        bold = {"text_font_size": "12px", "text_font_style": "bold"}
        figure.text("left", "y", text="name", x_offset=28, **bold, **ink)
        figure.text("right", "y", text="text", x_offset=-8, text_align="right", text_font_size="11px", **ink)
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
        order, depth = _rows(stage, parent)
        x, y = _INDENT * np.array(depth, float), -np.array(order, float)
        looks = [VERDICTS.get(word, _OTHER) for word in verdict]
        width = float(theme.WIDTH - 40)
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
            "left": x,
            "right": np.full(len(stage), width),
            "top": y + 0.42,
            "bottom": y - 0.42,
            "mark_x": x + 14,
            "line": [theme.ORANGE if best else ink for best, (_, ink) in zip(is_best, looks, strict=True)],
            "name": [theme.elide(name, _LETTERS) for name in stage],
            "text": [_line(*row) for row in zip(score, gain, verdict, strict=True)],
        }
        at = {name: i for i, name in enumerate(stage)}
        ends = [(at[above], i) for i, above in enumerate(parent) if above]
        ends.sort(key=lambda end: is_best[end[0]] and is_best[end[1]])  # what leads to the result is drawn on top
        trunk = [x[i] + _INDENT / 2 for i, _ in ends]  # down from the parent's box, then across to the child's
        colors = [theme.ORANGE if is_best[i] and is_best[j] else theme.NEUTRAL for i, j in ends]
        self.edges.data = {
            "x0": [*trunk, *trunk],
            "y0": [*(y[i] - 0.42 for i, _ in ends), *(y[j] for _, j in ends)],
            "x1": [*trunk, *(x[j] for _, j in ends)],
            "y1": [*(y[j] for _, j in ends)] * 2,
            "color": colors * 2,
        }
        if not stage:
            self._say("stages", empty="No stage has run yet.")
            return
        theme.set_range(self.figure.x_range, -4, width + 4)
        theme.set_range(self.figure.y_range, y.min() - 0.6, y.max() + 0.6)
        self.figure.height = 50 + ROW_HEIGHT * len(stage)
        kept = [value for value, word in zip(score, verdict, strict=True) if word in KEPT and np.isfinite(value)]
        best = f"best {self._score_name} {max(kept):.4g}" if kept else "none kept yet"
        wanted = f", target {target:.4g}" if target is not None else ""
        self._say(f"{len(stage)} stages, {best}{wanted}")


def _line(score: float, gain: float, verdict: str) -> str:
    parts = [f"{score:.4f}" if np.isfinite(score) else "", f"({gain:+.4f})" if np.isfinite(gain) else "", verdict]
    return " ".join(part for part in parts if part)


def _rows(stage: list[str], parent: list[str]) -> tuple[list[int], list[int]]:
    """The row of each stage, children under their parent in order, and its depth; raises ValueError for a stranger.

    >>> _rows(["a", "b", "c", "d"], ["", "a", "", "a"])
    ([0, 1, 3, 2], [0, 1, 0, 1])
    """
    children: dict[str, list[int]] = {}
    for i, above in enumerate(parent):
        if above and above not in stage:
            raise ValueError(f"decision_tree: {stage[i]!r} builds on {above!r}, which is no stage.")
        children.setdefault(above, []).append(i)
    row, depth = [0] * len(stage), [0] * len(stage)
    waiting, count = [(i, 0) for i in reversed(children.get("", []))], 0
    while waiting:
        i, level = waiting.pop()
        row[i], depth[i], count = count, level, count + 1
        waiting += [(child, level + 1) for child in reversed(children.get(stage[i], []))]
    return row, depth
