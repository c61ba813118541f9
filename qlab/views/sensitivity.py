"""Sensitivity: which layer costs what, as bars that grow while QuantAnalyzer measures; a click selects the layer."""

import time
from dataclasses import dataclass
from typing import Any

import ipywidgets
import pandas as pd

from qlab.analysis import Analysis, QuantAnalyzer, Row
from qlab.analysis.analysis import EARLIER
from qlab.analysis.cases import MODES, SUMMARY
from qlab.analysis.pictures import name_of, sensitivity_frame
from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.jobs import Job
from qlab.plots import sensitivity
from qlab.progress import Progress
from qlab.sim import QuantSim
from qlab.views.bokeh_pane import BokehPane
from qlab.views.tabs import tab
from qlab.views.view import View, escape

DRAW_EVERY_S = 0.25
QUICK_S = 3.0  # rows that an edit made old are measured again by themselves where that is expected to take less
_CAPTIONS = {"enabled": "only this layer quantized", "disabled": "all but this layer quantized"}
_COLUMNS = list(Row.__dataclass_fields__)
_NUMBERS = ("score", "error", "change", "change_error")


@dataclass(frozen=True)
class Update:
    """The rows of an analysis that an edit made old, measured again, as an analysis which a lab runs on a copy."""

    analysis: Analysis
    analyzer: QuantAnalyzer

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> "Updated":
        """The analysis as it is now."""
        return Updated(self.analyzer.update(self.analysis, sim, batches, score, progress))


@dataclass(frozen=True)
class Updated:
    """An analysis brought up to date."""

    analysis: Analysis


@tab("Sensitivity", place=25)
class Sensitivity(View):
    """The bars of the analysis that the lab runs or ran last, whoever started it; Measure starts one.

    After an edit of a layer its bar, with only this layer quantized, is measured again, by itself where that is quick;
    the others still hold. Until then, and where they do not hold, bars say so.

    analyzer: the settings to measure with, beside the widths typed; without it there is no estimate, which the bars
    do not show. `analysis`: what was measured last, None before; a cancelled one leaves the bars that it found.
    """

    def __init__(self, lab: Lab, analyzer: QuantAnalyzer | None = None) -> None:
        super().__init__(lab)
        self._lab = lab
        self._analyzer = analyzer or QuantAnalyzer(estimate=False)
        self.analysis: Analysis | None = None
        self._job: Job | None = None
        self._row_s = 0.0
        self._score_name = "SQNR [dB]" if lab.score is None else lab.score.name  # until an analysis says
        self._rows: dict[tuple[str, ...], Row] = {}
        self._drawn = 0.0
        self._is_drawing = False
        self._state = "Not measured yet: Measure finds what each layer costs, on a copy."
        self._bits = ipywidgets.Text(description="bits", placeholder="as set", tooltip="such as 4, 8, W4A8")
        self._bits.style.description_width, self._bits.layout.width = "28px", "150px"
        self._mode = ipywidgets.Dropdown(description="score with", options=[(_CAPTIONS[mode], mode) for mode in MODES])
        self._mode.style.description_width, self._mode.layout.width = "70px", "310px"
        self._start = ipywidgets.Button(description="Measure", icon="play", button_style="primary")
        self._start.layout.width = "auto"
        self._start.on_click(self.guarded(lambda _: self.measure()))
        self._renew = ipywidgets.Button(icon="refresh", layout=ipywidgets.Layout(display="none", width="auto"))
        self._renew.on_click(self.guarded(lambda _: self.update()))
        self._old: tuple[str, ...] = ()
        self._said = ipywidgets.HTML()
        self._figure = sensitivity(pd.DataFrame({"layer": [], "score": []}))
        self.pane = BokehPane(self._figure.figure, fallback=self._figure.to_svg)
        self._figure.source.selected.on_change("indices", self.guarded(self._clicked))
        self._mode.observe(self.guarded(lambda _: self._compare_rows()), "value")
        self.listen(lab.events.job_published, self._published)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.history_changed, self._compare_rows)
        self.listen(lab.events.selected, self._selected)
        bar = ipywidgets.HBox(
            [self._bits, self._mode, self._start, self._renew, self._said],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.display(bar, self.pane)
        self.redraw()

    def measure(self) -> Job:
        """Starts an analysis in the background; edits go on meanwhile. Raises SpecError for widths that are none."""
        settings: dict[str, Any] = dict(vars(self._analyzer))
        if self._bits.value.strip():
            settings["bits"] = self._bits.value.strip()
        return self._lab.start(QuantAnalyzer(**settings))

    def update(self) -> Job:
        """Starts to measure again, in the background, the rows that an edit made old; raises ValueError without any."""
        if self.analysis is None or not self._old:
            raise ValueError("no row is of an earlier state: there is nothing to measure again.")
        return self._lab.start(Update(self.analysis, self._analyzer))

    def redraw(self) -> None:
        """Shows the rows that are known, the most sensitive layer first."""
        rows = pd.DataFrame([vars(row) for row in list(self._rows.values())], columns=_COLUMNS)
        rows = rows.astype(dict.fromkeys(_NUMBERS, float))  # of no rows as well
        summary = rows[rows["mode"].isin(SUMMARY)]
        rows.loc[rows.layer.isin(self._old) & (rows["mode"] == "enabled"), "note"] = EARLIER
        frame, baseline = sensitivity_frame(rows, self._mode.value, summary)
        self._is_drawing = True
        try:
            with self.pane.batch():
                self._figure.update(frame, baseline=baseline, score_name=self._score_name)
                self._figure.select(self._lab.selected)
        finally:
            self._is_drawing = False
        self.pane.label = self._figure.headline
        self.pane.layout.display = None if len(frame) else "none"
        self._say()

    def to_html(self) -> str:
        """The bars as they are."""
        return self._said.value + (self.pane.to_html() if self._rows else "")

    def _published(self, job: Job, record: object) -> None:
        if not isinstance(record, Row):
            return
        if job is not self._job:
            self._job, self._rows, self._old, self.analysis = job, {}, (), None
        self._rows[record.key] = record
        self._state = "Measuring."
        now = time.monotonic()
        if now - self._drawn >= DRAW_EVERY_S:
            self._drawn = now
            self.redraw_soon()

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, Updated):
            self._job = None
            self._take(job.value.analysis, "Brought up to date", job.seconds)
        elif job is self._job and isinstance(job.value, Analysis):
            self._row_s = job.seconds / max(len(self._rows), 1)
            self._take(job.value, "Measured", job.seconds)
        elif job is self._job:
            self._state = "Cancelled." if isinstance(job.exception, Cancelled) else f"It failed: {job.exception}"
            self.redraw_soon()

    def _take(self, analysis: Analysis, how: str, seconds: float) -> None:
        """Changes what is shown to the rows of `analysis`."""
        self.analysis, self._old = analysis, ()
        rows = pd.concat([analysis.summary, analysis.enabled, analysis.disabled])
        self._rows = {row.key: row for row in (Row(**values) for values in rows.to_dict("records"))}
        self._score_name = name_of(analysis)
        self._state = f"{how}: {self._score_name}, {analysis.samples} samples, {seconds:.1f} s."
        self._compare_rows()

    def _compare_rows(self) -> None:
        """Looks which rows still hold; where few do not, offers to measure them again, or does where it is quick."""
        before, self._old = self._old, self._changed_layers()
        is_offered = self._holds_in_part and self._mode.value == "enabled"
        self._renew.description = f"Update {self._old[0]}" if len(self._old) == 1 else f"Update {len(self._old)} rows"
        self._renew.layout.display = "" if is_offered else "none"
        is_waiting = any(job.title == Update.__name__ for job in self._lab.jobs)
        if is_offered and self._old != before and not is_waiting and self._row_s * (len(self._old) + 3) < QUICK_S:
            self.update()
        self.redraw_soon()

    def _changed_layers(self) -> tuple[str, ...]:
        """The layers whose rows are of an earlier state."""
        return () if self.analysis is None else tuple(unit.layer for unit in self.analysis.changed_units(self._lab.sim))

    @property
    def _holds_in_part(self) -> bool:
        return self.analysis is not None and 0 < len(self._old) < len(self.analysis.units)

    def _say(self) -> None:
        said = self._state
        if self._mode.value == "enabled" and self._holds_in_part:
            said += f" Of an earlier state: {', '.join(self._old)}."
        elif self._old:
            said += " Measured in an earlier state."
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(said)}</span>"

    def _clicked(self, _attr: str, _old: Any, new: list[int]) -> None:
        if not self._is_drawing:
            labels = set(self._figure.layers_at(new))
            rows = [row for row in self._rows.values() if row.layer and {row.layer, f"{row.layer} {row.part}"} & labels]
            self._lab.select(list(dict.fromkeys(row.layer for row in rows)))

    def _selected(self, names: tuple[str, ...]) -> None:
        self._is_drawing = True
        try:
            self._figure.select(names)
        finally:
            self._is_drawing = False
