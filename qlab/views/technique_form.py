"""Techniques: choose one, set it up, run it, read its report. Those defined in a cell appear by themselves."""

import inspect
from typing import Any

import ipywidgets

from qlab.errors import Cancelled
from qlab.lab import Lab
from qlab.lab.code import technique_code
from qlab.lab.jobs import Job, JobState
from qlab.techniques import TECHNIQUES, Technique
from qlab.views.settings_form import SettingsForm
from qlab.views.tabs import tab
from qlab.views.view import View, close_all, escape

OWN_DATA = "the lab's batches"
LABELLED_DATA = "the score's batches, with labels"


@tab("Techniques", place=20)
class TechniqueForm(View):
    """The form of `technique`, or of any that is registered; its settings come from their declarations."""

    def __init__(self, lab: Lab, technique: type[Technique] | None = None) -> None:
        super().__init__(lab)
        self._lab = lab
        self._job: Job | None = None
        self.form: SettingsForm | None = None
        self._choice = ipywidgets.Dropdown(description="Technique", layout=ipywidgets.Layout(width="320px"))
        self._choice.style.description_width = "70px"
        self._about = ipywidgets.HTML()
        self._place = ipywidgets.VBox()
        self._data = ipywidgets.Dropdown(description="data", layout=ipywidgets.Layout(width="400px"))
        self._data.style.description_width = "140px"
        self._run = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self._report = ipywidgets.HTML(
            layout=ipywidgets.Layout(
                max_height="320px", overflow="auto", flex="2 1 400px", min_width="0", display="none"
            )
        )
        for widget in (self._about, self._report):
            widget.add_class("qlab-report")
        self._choice.observe(self.guarded(lambda _: self._show_form()), "value")
        self._run.on_click(self.guarded(lambda _: self.run()))
        self.listen(lab.events.job_ended, self._ended)
        self.after_cells(self.refresh)
        if technique is None:
            self.refresh()
        else:
            self._choice.options = [(technique.__name__, technique)]
            self._choice.value = technique
        left = ipywidgets.VBox(
            [self._about, self._place, self._data, self._run, self.frame],  # a refusal in sight of what was refused
            layout=ipywidgets.Layout(flex="3 1 600px", min_width="0"),
        )
        main = ipywidgets.HBox(
            [left, self._report],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="8px 16px"),
        )
        self.children = [self._choice, main]
        self._is_of_one = technique is not None

    def refresh(self) -> None:
        """Offers the techniques that there are now; one defined again replaces the earlier one."""
        if getattr(self, "_is_of_one", False):
            return
        options = list(TECHNIQUES.items())
        if list(self._choice.options) != options:
            chosen = self._choice.label
            self._choice.options = options
            self._choice.label = chosen if chosen in TECHNIQUES else options[0][0]

    @property
    def technique(self) -> type[Technique]:
        """The technique shown; assign another to show it."""
        return self._choice.value

    @technique.setter
    def technique(self, technique: type[Technique]) -> None:
        self.refresh()
        self._choice.value = technique

    def run(self) -> Job:
        """Starts the technique in the background; raises SettingError where a setting is refused."""
        assert self.form is not None
        made = self.form.make()
        self._job = self._lab.start(made, batches=self._labelled() if self._data.value == LABELLED_DATA else None)
        self._say(f"<p role='status'>{escape(technique_code(made).text)} is running.</p>")
        return self._job

    def summary(self) -> str:
        """One line, the same on every run."""
        return f"TechniqueForm({self._choice.label})"

    def to_html(self) -> str:
        """What the technique is, and its last report."""
        return self._about.value + self._report.value

    def _show_form(self) -> None:
        technique = self.technique
        if technique is None:
            return
        earlier, self.form = self.form, SettingsForm(technique)
        self._place.children = [self.form]
        if earlier is not None:
            close_all(earlier)
        labelled = self._labelled()
        self._data.options = [OWN_DATA] if labelled is None else [OWN_DATA, LABELLED_DATA]
        self._data.index = len(self._data.options) - 1 if technique.needs_labels else 0
        self._about.value = _about(technique)

    def _labelled(self) -> Any:
        return getattr(self._lab.score, "batches", None)

    def _ended(self, job: Job) -> None:
        if job is not self._job:
            return
        if job.report is not None:
            self._say(job.report._repr_html_())
        elif job.state is JobState.FAILED and job.exception is not None:
            self._say(f"<p>It failed: {escape(job.exception)}</p>")
        elif isinstance(job.exception, Cancelled):
            self._say(f"<p>{escape(job.exception)} The sim is as it was.</p>")

    def _say(self, markup: str) -> None:
        """What came of it, beside the form; it takes no room before."""
        self._report.value, self._report.layout.display = markup, None


def _about(technique: type[Technique]) -> str:
    first, _, rest = (inspect.getdoc(technique) or "").partition("\n\n")
    needs = ["labels"] if technique.needs_labels else ["data"] if technique.needs_data else []
    needs += ["a score"] if technique.needs_score else []
    note = f"<p><b>Deprecated</b>: {escape(technique.deprecated)}</p>" if technique.deprecated else ""
    more = f"<details><summary>More</summary><pre style='white-space: pre-wrap'>{escape(rest)}</pre></details>"
    needed = f"<p class='qlab-quiet'>needs {escape(' and '.join(needs))}</p>" if needs else ""
    return f"<p>{escape(first)}</p>{note}{needed}{more if rest else ''}"
