"""Diagnosis: why the selected layer loses what it loses, and fixes that were tried, each a button and one undo away."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import ipywidgets

from qlab.analysis import diagnosis as why
from qlab.analysis.fixes import Fix
from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.jobs import Job
from qlab.progress import Progress
from qlab.sim import QuantSim
from qlab.views.moment import Moment, moment_of
from qlab.views.tabs import tab
from qlab.views.view import View, close_all, escape

BATCHES = 8
SHOWN_FIXES = 8


@dataclass(frozen=True)
class Diagnose:
    """The diagnosis of one layer as an analysis, which a lab runs on a copy of its sim."""

    layer: str

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> why.Diagnosis:
        """The diagnosis on the first batches; `score` is not asked."""
        return why.diagnose(sim, self.layer, list(islice(batches, BATCHES)), progress)


@dataclass(frozen=True)
class Verify:
    """What a fix truly gained, as an analysis, which a lab runs on a copy of its sim."""

    diagnosis: why.Diagnosis
    number: int

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> "Verified":
        """The gain on the batches of the diagnosis; `batches` and `score` are not asked."""
        return Verified(self.diagnosis, self.number, self.diagnosis.measured_gain(sim))


@dataclass(frozen=True)
class Verified:
    """The gain [dB] and its error, measured after fix number `number` of a diagnosis was done."""

    diagnosis: why.Diagnosis
    number: int
    gain: tuple[float, float]


@tab("Diagnosis", place=30)
class Diagnosis(View):
    """Of the first selected layer: the parts of its error, the cause in a sentence, and what would help.

    `diagnosis`: the last one, None before. A fix is done through the lab, so it is a step that can be undone; one that
    is done in the state that was diagnosed is measured then, and the true gain stands beside the predicted one.
    `measured`: these gains, with their errors, by the number of the fix.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.diagnosis: why.Diagnosis | None = None
        self.measured: dict[int, tuple[float, float]] = {}
        self._fixing: tuple[int, Job] | None = None  # a fix whose technique is running
        self._fixed: Moment = ()
        self._job: Job | None = None
        self._moment: Moment = ()
        self._start = ipywidgets.Button(description="Diagnose", icon="stethoscope", button_style="primary")
        self._start.on_click(self.guarded(lambda _: self.diagnose()))
        self._said = ipywidgets.HTML()
        self._found = ipywidgets.HTML()
        self._found.add_class("qlab-report")
        self._fixes = ipywidgets.VBox()
        self.listen(lab.events.selected, lambda _: self._say())
        self.listen(lab.events.history_changed, self._say)
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_ended, self._ended)
        bar = ipywidgets.HBox([self._start, self._said], layout=ipywidgets.Layout(align_items="center"))
        self.display(bar, self._found, self._fixes)
        self._say()

    @property
    def layer(self) -> str | None:
        """The layer that Diagnose would look at: the first selected."""
        return self._lab.selected[0] if self._lab.selected else None

    def diagnose(self) -> Job:
        """Starts the diagnosis in the background; raises ValueError where no layer is selected."""
        if self.layer is None:
            raise ValueError("no layer is selected: select one, in the table of layers or with lab.select(name).")
        self._job = self._lab.start(Diagnose(self.layer))
        return self._job

    def fix(self, number: int) -> Any:
        """Does fix number `number` (0 is the best) through the lab; returns the Job of a technique."""
        if self.diagnosis is None:
            raise ValueError("there are no fixes yet: diagnose a layer first.")
        is_diagnosed = self._moment == moment_of(self._lab)
        done = self.diagnosis.fixes[number].perform(self._lab)
        if is_diagnosed and isinstance(done, Job):
            self._fixing = number, done
        elif is_diagnosed:
            self._verify(number)
        return done

    def _verify(self, number: int) -> None:
        """Starts to measure what a fix that was just done has gained."""
        if self.diagnosis is not None:
            self._fixed = moment_of(self._lab)
            self._lab.start(Verify(self.diagnosis, number))

    def redraw(self) -> None:
        """Shows the last diagnosis."""
        found = self.diagnosis
        if found is not None:
            nothing = "" if found.fixes else "<p>No fix that was tried helps by more than its own error.</p>"
            self._found.value = found.to_html() + nothing
            earlier, self._fixes.children = self._fixes.children, self._rows(found.fixes)
            for row in earlier:
                close_all(row)
        self._say()

    def to_html(self) -> str:
        """The last diagnosis."""
        found = () if self.diagnosis is None else self.diagnosis.fixes
        fixes = "".join(f"<li>{fix.to_html(self.measured.get(number))}</li>" for number, fix in enumerate(found))
        return f"{self._said.value}{self._found.value}<ul>{fixes}</ul>"

    def _rows(self, fixes: tuple[Fix, ...]) -> list[ipywidgets.HBox]:
        rows = []
        for number, fix in enumerate(fixes[:SHOWN_FIXES]):
            button = ipywidgets.Button(
                description="Apply", icon="wrench", tooltip=fix.label, layout=ipywidgets.Layout(width="86px")
            )
            button.on_click(self.guarded(lambda _, number=number: self.fix(number)))
            told = ipywidgets.HTML(fix.to_html(self.measured.get(number)))
            rows.append(ipywidgets.HBox([button, told], layout=ipywidgets.Layout(align_items="center")))
        return rows

    def _started(self, job: Job) -> None:
        if job is self._job:
            self._said.value = "<span role='status'>Diagnosing.</span>"

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, why.Diagnosis):  # whoever asked for it
            self.diagnosis, self._moment = job.value, moment_of(self._lab)
            self.measured = {}
            self.redraw_soon()
        elif isinstance(job.value, Verified):
            if job.value.diagnosis is self.diagnosis and self._fixed == moment_of(self._lab):  # else it was undone
                self.measured = {**self.measured, job.value.number: job.value.gain}
                self.redraw_soon()
        elif self._fixing is not None and job is self._fixing[1]:
            (number, _), self._fixing = self._fixing, None
            if job.exception is None:
                self._verify(number)
        elif job is self._job:
            self._say()
            if job.exception is not None and not isinstance(job.exception, Cancelled):
                self.frame.show(job.exception)

    def _say(self) -> None:
        layer = "no layer is selected" if self.layer is None else f"selected: {self.layer}"
        is_stale = self.diagnosis is not None and self._moment != moment_of(self._lab)
        stale = "; what is shown is of an earlier state" if is_stale else ""
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(layer + stale)}</span>"
