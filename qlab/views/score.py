"""The scores as a strip: quantized, float, change; marked while they belong to an earlier state."""

import math

import ipywidgets

from qlab.lab import Lab
from qlab.lab.scores import ScoreRow, Scores
from qlab.sim import Measurement
from qlab.views.view import View, escape


class Score(View):
    """One card a score, with its 95 % interval; recomputed in the background after every change."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._cards = ipywidgets.HTML()
        self._cards.add_class("qlab-score")
        self.listen(lab.events.scores, self._show)
        self.display(self._cards)
        self._show(lab.known_scores)
        lab.live = True
        if lab.scores_are_stale:
            lab.measure()

    def summary(self) -> str:
        """One line, the same on every run."""
        return f"Score({', '.join(row.name for row in self._lab.known_scores)})"

    def to_html(self) -> str:
        """The cards as they are."""
        return f'<div class="qlab-score">{self._cards.value}</div>'

    def _show(self, scores: Scores) -> None:
        size = f"<div><span>weights</span><span><b>{self._lab.size() / 1024:,.1f}</b> KiB</span></div>"
        cards = "".join(_card(row) for row in scores)
        self._cards.value = f'<div class="qlab-scores" role="status" aria-label="scores">{cards}{size}</div>'


def _card(row: ScoreRow) -> str:
    interval = row.quantized.interval if row.quantized is not None else None
    notes = []
    if row.float_value is not None and math.isfinite(row.float_value):
        notes.append(f"float {_number(float(row.float_value), row.float_value)}")
    if row.change is not None:
        notes.append(_number(row.change, row.quantized, sign=True))
    if interval is not None:
        low, high = (_number(bound, row.quantized) for bound in interval)
        notes.append(f"({low.rstrip('%')}–{high})")
    value = "–" if row.quantized is None else _number(float(row.quantized), row.quantized)
    state = "qlab-stale" if row.is_stale else ""
    return (
        f'<div class="{state}" title="in brackets the 95 % interval">'
        f"<span>{escape(row.name)}, {'measuring…' if row.is_stale else escape(row.data)}</span>"
        f"<span><b>{escape(value)}</b> <small>{escape(' '.join(notes))}</small></span></div>"
    )


def _number(value: float, like: Measurement | None, sign: bool = False) -> str:
    plus = "+" if sign else ""
    if like is not None and like.unit == "share":
        return f"{value:{plus}.1%}"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    unit = f" {like.unit}" if like is not None and like.unit else ""
    return f"{value:{plus}.1f}{unit}" if unit else f"{value:{plus}.4g}"
