"""Sensitivity: which layer costs what, as bars that grow while QuantAnalyzer measures; a click selects the layer."""

import time
from typing import Any

import ipywidgets
import pandas as pd

from qlab.analysis import Analysis, QuantAnalyzer, Row
from qlab.analysis.cases import MODES, SUMMARY
from qlab.analysis.pictures import sensitivity_frame
from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.jobs import Job
from qlab.plots import sensitivity
from qlab.views.bokeh_pane import BokehPane
from qlab.views.moment import Moment, moment_of
from qlab.views.tabs import tab
from qlab.views.view import View, escape

DRAW_EVERY_S = 0.25
_CAPTIONS = {"enabled": "only this layer quantized", "disabled": "all but this layer quantized"}
_COLUMNS = list(Row.__dataclass_fields__)
_NUMBERS = ("score", "error", "change", "change_error")


@tab("Sensitivity", place=25)
class Sensitivity(View):
    """The bars of the analysis that the lab runs or ran last, whoever started it; Measure starts one.

    analyzer: the settings to measure with, beside the widths typed; without it there is no estimate, which the bars
    do not show. `analysis`: what was measured last, None before; a cancelled one leaves the bars that it found.
    """

    def __init__(self, lab: Lab, analyzer: QuantAnalyzer | None = None) -> None:
        super().__init__(lab)
        self._lab = lab
        self._analyzer = analyzer or QuantAnalyzer(estimate=False)
        self.analysis: Analysis | None = None
        self._job: Job | None = None
        self._moment: Moment = ()
        self._rows: dict[tuple[str, ...], Row] = {}
        self._drawn = 0.0
        self._is_drawing = False
        self._state = "Not measured yet."
        self._bits = ipywidgets.Text(description="bits", placeholder="as set", tooltip="such as 4, 8, W4A8")
        self._bits.style.description_width, self._bits.layout.width = "28px", "150px"
        self._mode = ipywidgets.Dropdown(description="score with", options=[(_CAPTIONS[mode], mode) for mode in MODES])
        self._mode.style.description_width, self._mode.layout.width = "70px", "310px"
        self._start = ipywidgets.Button(description="Measure", icon="play", button_style="primary")
        self._start.on_click(self.guarded(lambda _: self.measure()))
        self._said = ipywidgets.HTML()
        self._figure = sensitivity(pd.DataFrame({"layer": [], "score": []}))
        self.pane = BokehPane(self._figure.figure, fallback=self._figure.to_svg)
        self._figure.source.selected.on_change("indices", self.guarded(self._clicked))
        self._mode.observe(self.guarded(lambda _: self.redraw_soon()), "value")
        self.listen(lab.events.job_published, self._published)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.history_changed, self._say)
        self.listen(lab.events.selected, self._selected)
        bar = ipywidgets.HBox(
            [self._bits, self._mode, self._start, self._said],
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

    def redraw(self) -> None:
        """Shows the rows that are known, the most sensitive layer first."""
        rows = pd.DataFrame([vars(row) for row in list(self._rows.values())], columns=_COLUMNS)
        rows = rows.astype(dict.fromkeys(_NUMBERS, float))  # of no rows as well
        summary = rows[rows["mode"].isin(SUMMARY)]
        frame, baseline = sensitivity_frame(rows, self._mode.value, summary)
        self._is_drawing = True
        try:
            with self.pane.batch():
                self._figure.update(frame, baseline=baseline)
                self._figure.select(self._lab.selected)
        finally:
            self._is_drawing = False
        self.pane.label = self._figure.headline
        self._say()

    def to_html(self) -> str:
        """The bars as they are."""
        return f"{self._said.value}{self.pane.to_html()}"

    def _published(self, job: Job, record: object) -> None:
        if not isinstance(record, Row):
            return
        if job is not self._job:
            self._job, self._rows, self._moment = job, {}, moment_of(self._lab)
        self._rows[record.key] = record
        self._state = "Measuring."
        now = time.monotonic()
        if now - self._drawn >= DRAW_EVERY_S:
            self._drawn = now
            self.redraw_soon()

    def _ended(self, job: Job) -> None:
        if job is not self._job:
            return
        if isinstance(job.value, Analysis):
            self.analysis = job.value
            rows = pd.concat([job.value.summary, job.value.enabled, job.value.disabled])
            found = [Row(**row) for row in rows.to_dict("records")]
            self._rows = {row.key: row for row in found}
            name = " ".join(filter(None, (job.value.score_name, job.value.score_unit)))
            self._state = f"{name}, {job.value.samples} samples, {job.seconds:.1f} s."
        else:
            self._state = "Cancelled." if isinstance(job.exception, Cancelled) else f"It failed: {job.exception}"
        self.redraw_soon()

    def _say(self) -> None:
        stale = " Measured in an earlier state." if self._moment and self._moment != moment_of(self._lab) else ""
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(self._state + stale)}</span>"

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
