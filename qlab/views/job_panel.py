"""The job that runs: how far it is, Pause and Cancel, and what came of it."""

import ipywidgets

from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.jobs import Job, JobState
from qlab.views.view import View, escape

_BAR_STYLES = {JobState.DONE: "success", JobState.CANCELLED: "warning", JobState.FAILED: "danger"}


class JobPanel(View):
    """A bar with step, rate and time left, buttons to pause and cancel, and the report or error of the last job.

    The measurement that follows every edit is shown by the scores; here it appears only if it fails. What a callback
    of the lab's events could not do is shown here as well.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._job: Job | None = None
        self._bar = ipywidgets.FloatProgress(
            value=0, min=0, max=1, layout=ipywidgets.Layout(width="72px", flex="0 0 auto")
        )
        self._pause = self._button("Pause", "pause", self._pause_or_resume)
        self._cancel = self._button("Cancel", "stop", self._stop)
        self._text = ipywidgets.HTML("<span class='qlab-quiet'>No job runs.</span>")
        self._text.layout.flex, self._text.layout.min_width = "1 1 0", "0"
        self._text.add_class("qlab-job")
        self._result = ipywidgets.HTML(layout=ipywidgets.Layout(max_height="260px", overflow="auto"))
        self._result.add_class("qlab-report")
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_progress, self._moved)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.error, self.frame.show)
        row = ipywidgets.HBox(
            [self._bar, self._pause, self._cancel, self._text],
            layout=ipywidgets.Layout(align_items="center"),
        )
        self.display(row, self._result)
        if lab.is_busy:
            self._started(lab.jobs[0])

    def to_html(self) -> str:
        """What came of the last job."""
        return f"<p>{self._text.value}</p>{self._result.value}"

    def _button(self, name: str, icon: str, action: object) -> ipywidgets.Button:
        button = ipywidgets.Button(
            description=name, icon=icon, disabled=True, layout=ipywidgets.Layout(width="80px", flex="0 0 auto")
        )
        button.on_click(self.guarded(lambda _: action()))  # type: ignore[operator]
        return button

    def _started(self, job: Job) -> None:
        if _is_measurement(job):
            return
        self._job = job
        self._bar.value, self._bar.bar_style = 0, ""
        self._pause.disabled = self._cancel.disabled = False
        self._result.value = ""
        self.frame.clear()
        self._say(job, "starting")

    def _moved(self, job: Job) -> None:
        if job is not self._job or job.state.is_over:
            return
        self._bar.max, self._bar.value = max(job.total, 1), job.done
        left = "" if job.seconds_left is None else f", about {job.seconds_left:.0f} s left"
        rate = "" if job.rate is None else f", {job.rate:.1f} steps/s"
        state = "cancelling, " if job.is_cancelling else "paused, " if job.is_paused else ""
        self._say(job, f"{state}{job.done} of {job.total} {job.text}", f"{job.seconds:.1f} s{rate}{left}")

    def _ended(self, job: Job) -> None:
        if _is_measurement(job):
            if job.state is JobState.FAILED and job.exception is not None:
                self.frame.show(job.exception)
            return
        if job is not self._job:
            return
        self._pause.disabled = self._cancel.disabled = True
        self._name_pause(job)
        self._bar.bar_style = _BAR_STYLES[job.state]
        self._say(job, f"{job.state.value} after {job.seconds:.1f} s")
        if job.state is JobState.DONE:
            self._bar.value = self._bar.max
            self._result.value = _folded(job)
        elif job.exception is not None and not isinstance(job.exception, Cancelled):
            self.frame.show(job.exception)

    def _say(self, job: Job, what: str, aside: str = "") -> None:
        waiting = len([other for other in self._lab.jobs if other is not job and not _is_measurement(other)])
        aside = ", ".join(filter(None, (aside, f"{waiting} more waiting" if waiting else "")))
        told = f"{job.title}: {what}"
        self._text.value = (
            f"<div role='status' title='{escape(told)}'><b>{escape(job.title)}</b>: {escape(what)}</div>"
            f"<div class='qlab-quiet' title='{escape(aside)}'>{escape(aside)}</div>"
        )

    def _pause_or_resume(self) -> None:
        job = self._job
        if job is not None and not job.state.is_over:
            (job.resume if job.is_paused else job.pause)()
            self._name_pause(job)
            self._say(job, f"{'pausing' if job.is_paused else 'running'}, {job.done} of {job.total} {job.text}")

    def _name_pause(self, job: Job) -> None:
        goes_on = job.is_paused and not job.state.is_over
        self._pause.description, self._pause.icon = ("Resume", "play") if goes_on else ("Pause", "pause")

    def _stop(self) -> None:
        job = self._job
        if job is not None and not job.state.is_over:
            job.cancel()
            self._name_pause(job)
            self._say(job, "cancelling")


def _is_measurement(job: Job) -> bool:
    return not job.changes and job.title == "measure"


def _folded(job: Job) -> str:
    """The report with its sentence in view; what other work returned, if it has a picture."""
    if job.report is None:
        show = getattr(job.value, "_repr_html_", None)
        return f"<details><summary>Result</summary>{show()}</details>" if show is not None else ""
    summary = f"{escape(job.report.technique)}: {escape(job.report.summary)}"
    return f"<details><summary>{summary}</summary>{job.report._repr_html_()}</details>"
