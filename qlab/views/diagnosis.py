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


@tab("Diagnosis", place=30)
class Diagnosis(View):
    """Of the first selected layer: the parts of its error, the cause in a sentence, and what would help.

    `diagnosis`: the last one, None before. A fix is done through the lab, so it is a step that can be undone.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.diagnosis: why.Diagnosis | None = None
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
        return self.diagnosis.fixes[number].perform(self._lab)

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
        fixes = "" if self.diagnosis is None else "".join(f"<li>{fix.to_html()}</li>" for fix in self.diagnosis.fixes)
        return f"{self._said.value}{self._found.value}<ul>{fixes}</ul>"

    def _rows(self, fixes: tuple[Fix, ...]) -> list[ipywidgets.HBox]:
        rows = []
        for number, fix in enumerate(fixes[:SHOWN_FIXES]):
            button = ipywidgets.Button(
                description="Apply", icon="wrench", tooltip=fix.label, layout=ipywidgets.Layout(width="86px")
            )
            button.on_click(self.guarded(lambda _, number=number: self.fix(number)))
            told = ipywidgets.HTML(fix.to_html())
            rows.append(ipywidgets.HBox([button, told], layout=ipywidgets.Layout(align_items="center")))
        return rows

    def _started(self, job: Job) -> None:
        if job is self._job:
            self._said.value = "<span role='status'>Diagnosing.</span>"

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, why.Diagnosis):  # whoever asked for it
            self.diagnosis, self._moment = job.value, moment_of(self._lab)
            self.redraw_soon()
        elif job is self._job:
            self._say()
            if job.exception is not None and not isinstance(job.exception, Cancelled):
                self.frame.show(job.exception)

    def _say(self) -> None:
        layer = "no layer is selected" if self.layer is None else f"selected: {self.layer}"
        is_stale = self.diagnosis is not None and self._moment != moment_of(self._lab)
        stale = "; what is shown is of an earlier state" if is_stale else ""
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(layer + stale)}</span>"
