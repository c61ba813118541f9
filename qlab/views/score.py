"""The scores: float, quantized, change; marked while they belong to an earlier state."""

import ipywidgets

from qlab.lab import Lab
from qlab.lab.scores import ScoreRow, Scores
from qlab.sim import Measurement
from qlab.views.view import View, escape

_STYLE = """<style>
.qlab-score table { border-collapse: collapse; font: 12px/1.6 var(--jp-ui-font-family, system-ui);
  color: var(--jp-ui-font-color1, #222) }
.qlab-score th, .qlab-score td { padding: 1px 10px; text-align: right; border-bottom: 1px solid
  var(--jp-border-color2, #ddd); font-variant-numeric: tabular-nums }
.qlab-score th:first-child, .qlab-score td:first-child { text-align: left }
.qlab-score td.qlab-main { font-weight: 600; font-size: 14px }
.qlab-score tr.qlab-stale td { opacity: .55; font-style: italic }
</style>"""


class Score(View):
    """One row a score, with its 95 % interval; recomputed in the background after every change."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._table = ipywidgets.HTML()
        self._table.add_class("qlab-score")
        self.listen(lab.events.scores, self._show)
        self.display(self._table)
        self._show(lab.known_scores)
        lab.live = True
        if lab.scores_are_stale:
            lab.measure()

    def summary(self) -> str:
        """One line, the same on every run."""
        return f"Score({', '.join(row.name for row in self._lab.known_scores)})"

    def to_html(self) -> str:
        """The table as it is."""
        return f'<div class="qlab-score">{self._table.value}</div>'

    def _show(self, scores: Scores) -> None:
        head = "".join(f'<th scope="col">{name}</th>' for name in ("score", "float", "quantized", "95 %", "change", ""))
        body = "".join(_row(row) for row in scores)
        size = f"{self._lab.size() / 1024:,.1f} KiB of weights"
        self._table.value = (
            f'{_STYLE}<table role="status" aria-live="polite"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            f'<tfoot><tr><td colspan="6">{size}</td></tr></tfoot></table>'
        )


def _row(row: ScoreRow) -> str:
    interval = row.quantized.interval if row.quantized is not None else None
    bounds = (
        "" if interval is None else f"{_number(interval[0], row.quantized)} – {_number(interval[1], row.quantized)}"
    )
    change = "" if row.change is None else _number(row.change, row.quantized, sign=True)
    cells = [_value(row.float_value), _value(row.quantized), bounds, change, "measuring…" if row.is_stale else ""]
    main = "".join(f'<td class="{"qlab-main" if i == 1 else ""}">{escape(cell)}</td>' for i, cell in enumerate(cells))
    title = f"on {row.data}"
    return (
        f'<tr class="{"qlab-stale" if row.is_stale else ""}"><td title="{escape(title)}">{escape(row.name)} '
        f"<small>({escape(row.data)})</small></td>{main}</tr>"
    )


def _value(measurement: Measurement | None) -> str:
    return "–" if measurement is None else _number(float(measurement), measurement)


def _number(value: float, like: Measurement | None, sign: bool = False) -> str:
    plus = "+" if sign else ""
    if like is not None and like.unit == "share":
        return f"{value:{plus}.1%}"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "-∞"
    unit = f" {like.unit}" if like is not None and like.unit else ""
    return f"{value:{plus}.1f}{unit}" if unit else f"{value:{plus}.4g}"
