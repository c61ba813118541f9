"""Which layer costs what: the score with one layer quantized, or with all but one, as bars sorted by damage."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from bokeh.models import Span

from qlab.plots import theme
from qlab.plots.columns import WrongColumns, numbers, read_frame, texts
from qlab.plots.layer_rows import LayerRows

MODES = {"enabled": "only this layer quantized", "disabled": "all but this layer quantized"}
HOLLOW = "rgba(0, 0, 0, 0)"  # the end of a bar with something to say, such as that it is of an earlier state
_COLUMNS = (
    "layer",
    "series",
    "score",
    "error",
    "note",
    "start",
    "end",
    "low",
    "high",
    "top",
    "bottom",
    "row",
    "color",
    "fill",
    "marker",
)


def sensitivity(
    frame: pd.DataFrame, *, baseline: float | Mapping[str, float] | None = None, score_name: str = "score"
) -> "SensitivityFigure":
    """Draw each layer's score as a bar from the baseline, the largest difference first.

    frame: one row per layer and series with `layer`, `score` (NaN: not measured or failed), and optionally
        `error` (standard error), `mode` ("enabled", "disabled"), `bits`, or a `series` name of your own instead of
        these two, and `note` (why a score is missing, or what is to be said of it; such a bar ends hollow).
    baseline: where bars start: the float score for "enabled", the quantized one for "disabled"; a mapping gives one for
        each series or mode. Without it bars start at 0.
    """
    plot = SensitivityFigure(score_name=score_name)
    plot.update(frame, baseline=baseline)
    return plot


class SensitivityFigure(LayerRows):
    """The live bars; `update` with a growing frame while a sweep runs re-sorts them and keeps the selection.

    Source columns beside those given: `start`, `end` (bar), `low`, `high` (score -+ error), `row`.
    """

    def __init__(self, *, score_name: str = "score"):
        super().__init__(score_name, _COLUMNS)
        self._score_name = score_name
        figure = self.figure
        bars = figure.quad(
            "start",
            "end",
            "top",
            "bottom",
            source=self.source,
            fill_color="color",
            line_color=None,
            fill_alpha=0.4,
            nonselection_fill_alpha=0.15,
        )
        figure.segment(
            "low",
            "row",
            "high",
            "row",
            source=self.source,
            line_color="color",
            line_width=2,
            nonselection_line_alpha=0.3,
        )
        ends = figure.scatter(
            "end",
            "row",
            source=self.source,
            marker="marker",
            size=8,
            fill_color="fill",
            line_color="color",
            nonselection_alpha=0.3,
        )
        self._ends = ends
        self._zero = Span(dimension="height", line_color=theme.NEUTRAL, line_width=1)
        figure.add_layout(self._zero)
        tips = [
            ("layer", "@layer"),
            ("series", "@series"),
            (score_name, "@score{0.0000}"),
            ("± error", "@error{0.0000}"),
        ]
        theme.add_hover(figure, [bars, ends], [*tips, ("note", "@note")])

    def update(
        self,
        frame: pd.DataFrame,
        *,
        baseline: float | Mapping[str, float] | None = None,
        score_name: str | None = None,
    ) -> None:
        """Show other scores in place; arguments as in `sensitivity`, without a name it stays."""
        if score_name is not None:
            self._score_name = self.figure.xaxis[0].axis_label = score_name
        frame = read_frame(frame, ("layer", "score"), "sensitivity")
        chosen = self.layers_at(self.source.selected.indices)
        score = numbers(frame, "score", "sensitivity")
        error = numbers(frame, "error", "sensitivity") if "error" in frame.columns else np.full(len(frame), np.nan)
        layer, note, (series, modes) = texts(frame, "layer"), texts(frame, "note"), _series(frame)
        names = list(dict.fromkeys(series))
        start = np.array(
            [_baseline(baseline, name, mode) for name, mode in zip(series, modes, strict=True)], dtype=float
        )
        damage: dict[str, float] = {}  # by layer, what its score differs from the baseline; NaN where it has none
        for name, difference in zip(layer, score - start, strict=True):
            damage[name] = max(damage.get(name, np.nan), difference, key=lambda d: np.nan_to_num(abs(d), nan=-1.0))
        order = sorted(damage, key=lambda name: np.nan_to_num(abs(damage[name]), nan=-1.0), reverse=True)
        rows = {name: row for row, name in enumerate(order)}
        slot, height = {name: i for i, name in enumerate(names)}, 0.8 / max(len(names), 1)
        top = np.array(
            [rows[name] - 0.4 + slot[kind] * height for name, kind in zip(layer, series, strict=True)], dtype=float
        )
        is_missing = np.isnan(score)
        note = [text or ("not measured yet" if gone else "") for text, gone in zip(note, is_missing, strict=True)]
        end = np.where(is_missing, start, score)
        color = [
            theme.NEUTRAL if gone else _look(theme.SERIES, slot[kind])
            for kind, gone in zip(series, is_missing, strict=True)
        ]
        self.source.data = {
            "layer": layer,
            "series": series,
            "score": score,
            "error": error,
            "note": note,
            "start": start,
            "end": end,
            "low": score - error,
            "high": score + error,
            "top": top + height * 0.08,
            "bottom": top + height * 0.92,
            "row": top + height / 2,
            "color": color,
            "fill": [HOLLOW if text else full for text, full in zip(note, color, strict=True)],
            "marker": [
                "x" if gone else _look(theme.MARKERS, slot[kind]) for kind, gone in zip(series, is_missing, strict=True)
            ],
        }
        self._set_rows(list(rows))
        self.select(chosen)
        first = [
            next((i for i, kind in enumerate(series) if kind == name and not is_missing[i]), None) for name in names
        ]
        self._set_legend([(name, [self._ends], i) for name, i in zip(names, first, strict=True) if i is not None])
        self._zero.location = float(start[0]) if len(set(start)) == 1 else None
        extent = np.concatenate([start, end, score - error, score + error])
        extent = extent[np.isfinite(extent)]
        if len(extent):
            theme.set_range(self.figure.x_range, *theme.padded(extent.min(), extent.max()))
        self._say_headline(list(rows), layer, score, damage)

    def _say_headline(self, order: list[str], layer: list[str], score: np.ndarray, damage: dict[str, float]) -> None:
        if not order:
            self._say("sensitivity", empty="No layer was measured: the analysis has no rows.")
            return
        done = len({name for name, value in zip(layer, score, strict=True) if np.isfinite(value)})
        measured = f"{done} of {len(order)} layers measured" if done < len(order) else f"{done} layers"
        worst = f", worst {theme.elide(order[0], 30)} ({damage[order[0]]:+.3g})" if done else ""
        self._say(f"{self._score_name}: {measured}{self._more_rows()}{worst}")  # one line, at a cell's width


def _series(frame: pd.DataFrame) -> tuple[list[str], list[str]]:
    modes = texts(frame, "mode")
    if "series" in frame.columns:
        return texts(frame, "series"), modes
    wrong = sorted({mode for mode in modes if mode} - set(MODES))
    if wrong:
        raise WrongColumns(f"sensitivity knows the modes {list(MODES)}; column 'mode' also has {wrong}.")
    bits = [f"{text.removesuffix('.0')} bits" if text else "" for text in texts(frame, "bits")]
    return [
        ", ".join(part for part in (MODES.get(mode, ""), width) if part)
        for mode, width in zip(modes, bits, strict=True)
    ], modes


def _baseline(baseline: float | Mapping[str, float] | None, series: str, mode: str) -> float:
    if isinstance(baseline, Mapping):
        if series not in baseline and mode not in baseline:
            raise WrongColumns(
                f"baseline has no value for series '{series}' or mode '{mode}'; it has {list(baseline)}."
            )
        return float(baseline[series] if series in baseline else baseline[mode])
    return 0.0 if baseline is None else float(baseline)


def _look(kinds: tuple[str, ...], number: int) -> str:
    return kinds[number % len(kinds)]
