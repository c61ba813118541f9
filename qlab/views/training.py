"""Training: loss and score while QAT runs, and how the range of the layer that it follows moves."""

import math
import time

import ipywidgets
import pandas as pd

from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.jobs import Job, JobState
from qlab.plots import range_history, training
from qlab.techniques.training_control import TrainingStep
from qlab.views.bokeh_pane import BokehPane
from qlab.views.tabs import tab
from qlab.views.view import View, escape

DRAW_EVERY_S = 0.25
_COLUMNS = list(TrainingStep.__dataclass_fields__)


@tab("Training", place=37)
class Training(View):
    """The curves of the training that the lab runs or ran last, whoever started it; `steps` are its records.

    A layer is followed where the technique says so: `QAT(follow="fc")`.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.steps: list[TrainingStep] = []
        self._job: Job | None = None
        self._drawn = 0.0
        self._said = ipywidgets.HTML()
        self._curves = training(pd.DataFrame({"step": [], "loss": []}))
        self._range = range_history(pd.DataFrame({"step": [], "low": [], "high": []}))
        self.curves = BokehPane(self._curves.figure, fallback=self._curves.to_svg)
        self.range = BokehPane(self._range.figure, fallback=self._range.to_svg)
        for pane in (self.curves, self.range):
            pane.layout.flex, pane.layout.min_width = "1 1 420px", "0"
        self.listen(lab.events.job_published, self._published)
        self.listen(lab.events.job_ended, self._ended)
        panes = ipywidgets.HBox([self.curves, self.range], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.display(self._said, panes)
        self._say("No training yet: run QAT, in the tab Techniques or with lab.start(qlab.QAT(...)).")
        self.redraw()

    def redraw(self) -> None:
        """Shows the steps that were taken."""
        frame = pd.DataFrame([vars(step) for step in list(self.steps)], columns=_COLUMNS)
        frame = frame.astype(dict.fromkeys(("loss", "score", "low", "high", "clipped"), float))
        with self.curves.batch():
            self._curves.update(frame)
        self.curves.label = self._curves.headline
        ranges = frame[[not math.isnan(low) for low in frame["low"]]]
        with self.range.batch():
            self._range.update(ranges, name=str(ranges["layer"].iloc[-1]) if len(ranges) else "")
        self.range.label = self._range.headline
        self.range.layout.display = None if len(ranges) else "none"

    def to_html(self) -> str:
        """The curves as they are."""
        return f"{self._said.value}{self.curves.to_html()}"

    def _published(self, job: Job, record: object) -> None:
        if not isinstance(record, TrainingStep):
            return
        if job is not self._job:
            self._job, self.steps = job, []
        self.steps.append(record)
        now = time.monotonic()
        if now - self._drawn >= DRAW_EVERY_S:
            self._drawn = now
            self._say(f"{job.title}, epoch {record.epoch}, step {record.step}.")
            self.redraw_soon()

    def _ended(self, job: Job) -> None:
        if job is not self._job:
            return
        if job.report is not None:
            self._say(f"{job.title}: {job.report.summary}")
        elif isinstance(job.exception, Cancelled):
            self._say("Cancelled. The sim is as it was.")
        elif job.state is JobState.FAILED:
            self._say(f"It failed: {job.exception}")
        self.redraw_soon()

    def _say(self, sentence: str) -> None:
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(sentence)}</span>"
