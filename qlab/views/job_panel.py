"""The job that runs: how far it is, Cancel, and what came of it."""

import ipywidgets

from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.jobs import Job, JobState
from qlab.views.view import View, escape


class JobPanel(View):
    """A bar with step, rate and time left, a Cancel button, and the report or error of the last job.

    Measuring jobs run after every edit; they are shown only when they last.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._job: Job | None = None
        self._bar = ipywidgets.FloatProgress(value=0, min=0, max=1, layout=ipywidgets.Layout(width="200px"))
        self._cancel = ipywidgets.Button(description="Cancel", icon="stop", disabled=True)
        self._cancel.layout.width = "90px"
        self._text = ipywidgets.HTML("idle")
        self._result = ipywidgets.HTML()
        self._cancel.on_click(self.guarded(lambda _: self._stop()))
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_progress, self._moved)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.error, self._failed)
        row = ipywidgets.HBox([self._bar, self._cancel, self._text], layout=ipywidgets.Layout(align_items="center"))
        self.display(row, self._result)

    def _started(self, job: Job) -> None:
        if not job.changes and job.title == "measure":
            return
        self._job = job
        self._bar.value, self._bar.bar_style = 0, ""
        self._cancel.disabled = False
        self._result.value = ""
        self._text.value = f"{escape(job.title)}: starting"

    def _moved(self, job: Job) -> None:
        if job is not self._job:
            return
        self._bar.max, self._bar.value = max(job.total, 1), job.done
        left = "" if job.seconds_left is None else f", about {job.seconds_left:.0f} s left"
        rate = "" if job.rate is None else f", {job.rate:.1f} steps/s"
        self._text.value = (
            f"{escape(job.title)}: {job.done} of {job.total} {escape(job.text)} "
            f"<small>{job.seconds:.1f} s{rate}{left}</small>"
        )

    def _ended(self, job: Job) -> None:
        if job is not self._job:
            return
        self._cancel.disabled = True
        style = {JobState.DONE: "success", JobState.CANCELLED: "warning", JobState.FAILED: "danger"}
        self._bar.bar_style = style.get(job.state, "")
        self._text.value = f"{escape(job.title)}: {job.state.value} after {job.seconds:.1f} s"
        if job.state is JobState.DONE:
            self._bar.value = self._bar.max
            self._result.value = job.report._repr_html_() if job.report is not None else ""
        elif job.exception is not None and not isinstance(job.exception, Cancelled):
            self.error_box.show(job.exception)

    def _failed(self, error: BaseException) -> None:
        self.error_box.show(error)

    def _stop(self) -> None:
        if self._job is not None and not self._job.state.is_over:
            self._job.cancel()
            self._text.value = f"{escape(self._job.title)}: cancelling"
