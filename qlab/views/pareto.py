"""Pareto: configurations of mixed precision by cost and score; a click on one gives it to the lab, as one step."""

from dataclasses import dataclass
from typing import Any

import ipywidgets
import pandas as pd

from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.jobs import Job
from qlab.plots import pareto
from qlab.progress import Progress
from qlab.sim import QuantSim
from qlab.techniques import MixedPrecision
from qlab.techniques.chosen_bits import _ChosenBits
from qlab.techniques.mixed_precision_front import Front, Point
from qlab.techniques.mixed_precision_search import METRICS
from qlab.views.bokeh_pane import BokehPane
from qlab.views.moment import Moment, moment_of
from qlab.views.tabs import tab
from qlab.views.view import View, escape


@dataclass(frozen=True)
class PrecisionFront:
    """The front of MixedPrecision as an analysis, which a lab runs on a copy of its sim."""

    technique: MixedPrecision

    @property
    def __name__(self) -> str:
        return "mixed precision"

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> Front:
        """The front; `sim` is not changed."""
        return self.technique.front(sim, batches, score, progress)


@tab("Pareto", place=35)
class Pareto(View):
    """The front of size (or bit operations) against score. `front`: the last one, None before.

    A click on a point applies it: one step of the history, which undo takes back.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.front: Front | None = None
        self._job: Job | None = None
        self._moment: Moment = ()
        self._is_drawing = False
        self._bits = ipywidgets.Text(
            value=", ".join(map(str, MixedPrecision().bits)), description="bits", tooltip="widths to choose from"
        )
        self._budget = ipywidgets.FloatText(value=6.0, description="budget", tooltip="bits throughout of equal cost")
        self._metric = ipywidgets.Dropdown(options=list(METRICS), description="cost")
        for widget, label, width in (
            (self._bits, "28px", "180px"),
            (self._budget, "56px", "124px"),
            (self._metric, "36px", "150px"),
        ):
            widget.style.description_width, widget.layout.width = label, width
        self._start = ipywidgets.Button(description="Find", icon="play", button_style="primary")
        self._start.layout.width = "auto"
        self._start.on_click(self.guarded(lambda _: self.find()))
        self._said = ipywidgets.HTML()
        self._figure = pareto(pd.DataFrame({"cost": [], "score": []}))
        self.pane = BokehPane(self._figure.figure, fallback=self._figure.to_svg, label=self._figure.headline)
        self.pane.layout.display = "none"  # until there is a front
        self._figure.source.selected.on_change("indices", self.guarded(self._clicked))
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.history_changed, self._say)
        bar = ipywidgets.HBox(
            [self._bits, self._budget, self._metric, self._start, self._said],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.display(bar, self.pane)
        self._say()

    def find(self) -> Job:
        """Starts the search on a copy of the sim; edits go on meanwhile. Raises SettingError for what is refused."""
        widths = tuple(int(width) for width in self._bits.value.split(",") if width.strip())
        technique = MixedPrecision(bits=widths, budget=self._budget.value, metric=self._metric.value)
        self._job = self._lab.start(PrecisionFront(technique))
        return self._job

    def apply(self, point: Point) -> Job:
        """Gives the lab the bits of `point`, as one step; raises Busy while a job changes the sim."""
        return self._lab.start(_ChosenBits(settings=point.settings, label=point.label))

    def redraw(self) -> None:
        """Shows the front."""
        if self.front is not None:
            self._is_drawing = True
            try:
                with self.pane.batch():
                    self._figure.figure.xaxis.axis_label = self.front.cost_name
                    self._figure.figure.yaxis.axis_label = self.front.score_name
                    self._figure.source.selected.indices = []
                    self._figure.update(self.front.to_pandas())
            finally:
                self._is_drawing = False
            self.pane.label, self.pane.layout.display = self._figure.headline, None
        self._say()

    def to_html(self) -> str:
        """The front as it is."""
        return self._said.value + (self.pane.to_html() if self.front is not None else "")

    def _started(self, job: Job) -> None:
        if job is self._job:
            self._said.value = "<span role='status'>Searching.</span>"

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, Front):
            self.front, self._moment = job.value, moment_of(self._lab)
            self.redraw_soon()
        elif job is self._job:
            self._say()
            if job.exception is not None and not isinstance(job.exception, Cancelled):
                self.frame.show(job.exception)

    def _clicked(self, _attr: str, _old: Any, new: list[int]) -> None:
        if not self._is_drawing and self.front is not None and new:
            self.apply(self.front.points[new[0]])

    def _say(self) -> None:
        if self.front is None:
            text = "No front yet: Find searches the bits of each layer, on a copy."
        else:
            text = f"Chosen for the budget: {self.front.chosen.label}. Click a point to apply it."
            if self._moment != moment_of(self._lab):
                text += " The front was found in an earlier state."
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(text)}</span>"
