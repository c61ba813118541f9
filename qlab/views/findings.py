"""Findings: what validation says of the model as it is now; a click on a finding selects its layer."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import ipywidgets

from qlab.graph.findings import Finding, Severity
from qlab.graph.findings import Findings as Found
from qlab.lab import Lab
from qlab.lab.jobs import Job
from qlab.progress import Progress
from qlab.sim import QuantSim
from qlab.sim.validate import validate
from qlab.views.moment import Moment, moment_of
from qlab.views.tabs import tab
from qlab.views.view import View, close_all, escape

SHOWN = 60
ICONS = {Severity.ERROR: "times-circle", Severity.WARNING: "exclamation-triangle", Severity.HINT: "lightbulb-o"}


@dataclass(frozen=True)
class Validate:
    """Validation as an analysis, which a lab runs in the background; the first batch is the example."""

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> Found:
        """The findings on the sim's float model under its preset; `score` is not asked."""
        progress.step(0, 1, "validation")
        return validate(sim.model, next(islice(batches, 1)), sim.preset)


@tab("Findings", place=17)
class Findings(View):
    """What stands in the way, what is lost, why it matters and how to mend it, the worst first.

    `findings`: those shown. Given none, Validate looks at the sim's own model: what was folded or equalized since the
    beginning is no finding any more. Given those of qlab.validate(model, example), it shows them.
    """

    def __init__(self, lab: Lab, findings: Found | None = None) -> None:
        super().__init__(lab)
        self._lab = lab
        self.findings = findings
        self._job: Job | None = None
        self._moment: Moment = moment_of(lab)
        self._start = ipywidgets.Button(description="Validate", icon="check-square-o", button_style="primary")
        self._start.on_click(self.guarded(lambda _: self.validate()))
        self._shown = ipywidgets.Dropdown(
            description="Show", options={"all": tuple(Severity), **{f"{s.value}s": (s,) for s in Severity}}
        )
        self._shown.style.description_width, self._shown.layout.width = "44px", "170px"
        self._shown.observe(self.guarded(lambda _: self.redraw_soon()), "value")
        self._said = ipywidgets.HTML()
        self._rows = ipywidgets.VBox()
        self.listen(lab.events.history_changed, self._say)
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_ended, self._ended)
        bar = ipywidgets.HBox(
            [self._start, self._shown, self._said], layout=ipywidgets.Layout(align_items="center", flex_flow="row wrap")
        )
        self.display(bar, self._rows)
        self.redraw()

    def validate(self) -> Job:
        """Starts validation in the background."""
        self._job = self._lab.start(Validate())
        return self._job

    def redraw(self) -> None:
        """Shows the findings of the chosen severity."""
        earlier, self._rows.children = self._rows.children, [self._row(finding) for finding in self._chosen()[:SHOWN]]
        for row in earlier:
            close_all(row)
        self._say()

    def to_html(self) -> str:
        """All findings as a table."""
        return self._said.value if self.findings is None else self.findings._repr_html_()

    def _chosen(self) -> list[Finding]:
        return [f for f in self.findings or () if f.severity in self._shown.value]

    def _row(self, finding: Finding) -> ipywidgets.HBox:
        layers = self._layers(finding)
        button = ipywidgets.Button(
            description=finding.layer or finding.code,
            icon=ICONS[finding.severity],
            tooltip=f"select {finding.layer}" if layers else "it belongs to no single layer",
            disabled=not layers,
            layout=ipywidgets.Layout(width="210px", flex="0 0 auto"),
        )
        button.on_click(self.guarded(lambda _: self._lab.select(layers)))
        told = ipywidgets.HTML(_told(finding), layout=ipywidgets.Layout(flex="1 1 0", min_width="0"))
        told.add_class("qlab-report")
        return ipywidgets.HBox([button, told], layout=ipywidgets.Layout(align_items="flex-start", grid_gap="8px"))

    def _layers(self, finding: Finding) -> list[str]:
        """The layers that a finding is about: its own, or those of the module that it names."""
        known = self._lab.sim.layers
        if finding.layer is None or finding.layer in known:
            return [finding.layer] if finding.layer is not None else []
        return [name for name in known if name.startswith((f"{finding.layer}.", f"{finding.layer}@"))]

    def _started(self, job: Job) -> None:
        if job is self._job:
            self._said.value = "<span role='status'>Validating.</span>"

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, Found):  # whoever asked for it
            self.findings, self._moment = job.value, moment_of(self._lab)
            self.redraw_soon()
        elif job is self._job:
            self._say()
            if job.exception is not None:
                self.frame.show(job.exception)

    def _say(self) -> None:
        if self.findings is None:
            told = "Validate reads the model as it is now and says what quantization will meet."
        else:
            count = len(self._chosen())
            told = repr(self.findings).partition("\n")[0]
            told += f"; the first {SHOWN} of {count} are shown" if count > SHOWN else ""
            told += "; of an earlier state" if self._moment != moment_of(self._lab) else ""
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(told)}</span>"


def _told(finding: Finding) -> str:
    where = f"<br><span class='qlab-quiet'>{escape(finding.location)}</span>" if finding.location else ""
    return (
        f"<details><summary><b>{escape(finding.code)}</b> {finding.severity.value}: {escape(finding.what)}</summary>"
        f"<p>{escape(finding.why)}</p><p><b>Mend:</b> {escape(finding.remedy)}{where}</p></details>"
    )
