"""The guidebook as a wizard: run a step, read its evidence and what it concludes, apply a remedy, go on."""

from typing import Any

import ipywidgets

from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab import guidebook as flow
from qlab.lab.guidebook_steps import STEPS, Finding, described
from qlab.lab.jobs import Job
from qlab.views.histogram import Histogram
from qlab.views.moment import Moment, moment_of
from qlab.views.tabs import tab
from qlab.views.view import View, close_all, escape

SHOWN_REMEDIES = 6


@tab("Guidebook", place=15)
class Guidebook(View):
    """`guide` as a wizard, a new one unless given. What its steps look at is selected; remedies can be undone."""

    def __init__(self, lab: Lab, guide: flow.Guidebook | None = None) -> None:
        super().__init__(lab)
        self._lab = lab
        self.guide = guide or flow.Guidebook(lab)
        self._job: Job | None = None
        self._moment: Moment = ()
        self._seen = 0
        self._picture: Histogram | None = None
        self._path = ipywidgets.HTML()
        self._choice = ipywidgets.Dropdown(description="Step", layout=ipywidgets.Layout(width="330px"))
        self._choice.style.description_width = "40px"
        self._choice.options = [(step.title, key) for key, step in STEPS.items()]
        self._choice.value = next(iter(STEPS))
        self._run = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self._run.on_click(self.guarded(lambda _: self.run()))
        self._why = ipywidgets.HTML()
        self._found = ipywidgets.HTML()
        self._found.add_class("qlab-report")
        self._remedies = ipywidgets.VBox()
        self._place = ipywidgets.VBox()
        self._past = ipywidgets.HTML()
        self._past.add_class("qlab-report")
        self._choice.observe(self.guarded(lambda _: self._say()), "value")
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.history_changed, self._say)
        self.after_cells(self._notice)
        bar = ipywidgets.HBox(
            [self._choice, self._run, self._why], layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        )
        self.display(self._path, bar, self._found, self._remedies, self._place, self._past)
        self.redraw()

    def run(self) -> Job:
        """Starts the step that is chosen: the one offered, unless the person chose another."""
        offered, chosen = self.guide.offered, self._choice.value
        self._job = self.guide.start(None if offered is not None and offered.key == chosen else chosen)
        return self._job

    def apply(self, number: int) -> Any:
        """Does a remedy of the last finding through the lab; returns the Job of a technique."""
        return self.guide.begin(number)

    def redraw(self) -> None:
        """Shows the last finding, and offers the next step."""
        findings = self.guide.findings
        self._seen = len(findings)
        self._path.value = _path(findings)
        if findings:
            last = findings[-1]
            self._found.value = _page(last)
            earlier, self._remedies.children = self._remedies.children, self._rows(last)
            for row in earlier:
                close_all(row)
            self._show_layer(last)
            self._past.value = _earlier(findings[:-1])
        offered = self.guide.offered
        if offered is not None:
            self._choice.value = offered.key
        self._say()

    def summary(self) -> str:
        """One line, the same on every run."""
        return repr(self.guide)

    def to_html(self) -> str:
        """Everything found so far."""
        return self._path.value + "".join(_page(found) for found in self.guide.findings)

    def _rows(self, found: Finding) -> list[ipywidgets.HBox]:
        rows = []
        for number, fix in enumerate(found.remedies[:SHOWN_REMEDIES]):
            button = ipywidgets.Button(
                description="Apply", icon="wrench", tooltip=fix.label, layout=ipywidgets.Layout(width="86px")
            )
            button.on_click(self.guarded(lambda _, number=number: self.apply(number)))
            told = ipywidgets.HTML(escape(described(fix)))
            rows.append(ipywidgets.HBox([button, told], layout=ipywidgets.Layout(align_items="center")))
        return rows

    def _show_layer(self, found: Finding) -> None:
        """The histogram of the layer that a finding is about."""
        if found.layer is not None:
            self._lab.select([found.layer])
            if self._picture is None:
                self._picture = Histogram(self._lab)
                self._place.children = [self._picture]
        self._place.layout.display = None if found.layer is not None else "none"

    def _notice(self) -> None:
        """Steps may be run from a cell as well."""
        if len(self.guide.findings) != self._seen:
            self._moment = moment_of(self._lab)
            self.redraw_soon()

    def _started(self, job: Job) -> None:
        if job is self._job:
            self._why.value = "<span role='status'>Looking.</span>"

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, Finding):
            self._notice()
        elif job is self._job:
            self._say()
            if job.exception is not None and not isinstance(job.exception, Cancelled):
                self.frame.show(job.exception)

    def _say(self) -> None:
        offered, chosen = self.guide.offered, STEPS[self._choice.value]
        texts = [chosen.why]
        if offered is None:
            texts.append("The guidebook is at its end; any step can be run again.")
        if self.guide.findings and self._moment and self._moment != moment_of(self._lab):
            texts.append("The sim changed since the last step.")
        self._why.value = f"<span class='qlab-quiet' role='status'>{escape(' '.join(texts))}</span>"


def _path(findings: list[Finding]) -> str:
    """The steps taken, as a line."""
    taken = " &rarr; ".join(escape(found.step.title) for found in findings)
    return f"<small class='qlab-quiet'>{taken or 'Nothing was looked at yet.'}</small>"


def _page(found: Finding) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in found.evidence.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>"
        for row in found.evidence.itertuples(index=False)
    )
    return (
        f"<p><b>{escape(found.step.title)}</b></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p role='status'>{escape(found.conclusion)}</p>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return escape(value)


def _earlier(findings: list[Finding]) -> str:
    if not findings:
        return ""
    pages = "".join(_page(found) for found in reversed(findings))
    return f"<details><summary>{len(findings)} earlier</summary>{pages}</details>"
