"""Export: the files that a target reads, written in the background from the state that the lab is in."""

from dataclasses import dataclass
from typing import Any

import ipywidgets

from qlab.errors import Cancelled
from qlab.export.encodings_write import VERSIONS
from qlab.export.export import FORMATS, Exported
from qlab.lab import Lab
from qlab.lab.jobs import Job
from qlab.progress import Progress
from qlab.sim import QuantSim
from qlab.views.moment import Moment, moment_of
from qlab.views.tabs import tab
from qlab.views.view import View, escape


@dataclass(frozen=True)
class Export:
    """Writing the files as an analysis, which a lab runs on a copy of its sim."""

    path: str
    encodings: str
    formats: tuple[str, ...]

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> Exported:
        """The files written; data and score are not asked."""
        return sim.export(self.path, self.encodings, formats=self.formats, progress=progress)


@tab("Export", place=60)
class ExportPanel(View):
    """Where to, which files, which version of the encodings; then what was written. `exported`: None before."""

    def __init__(self, lab: Lab, path: str = "exported/model") -> None:
        super().__init__(lab)
        self._lab = lab
        self.exported: Exported | None = None
        self._job: Job | None = None
        self._moment: Moment = ()
        self._path = ipywidgets.Text(value=path, description="path", tooltip="folder and name, without a suffix")
        self._path.style.description_width, self._path.layout.width = "32px", "330px"
        self._encodings = ipywidgets.Dropdown(options=list(VERSIONS), description="encodings")
        self._encodings.value = "1.0.0"
        self._encodings.style.description_width, self._encodings.layout.width = "66px", "160px"
        self._formats = {
            name: ipywidgets.Checkbox(value=name != "program", description=name, indent=False) for name in FORMATS
        }
        for box in self._formats.values():
            box.layout.width = "110px"
        self._start = ipywidgets.Button(description="Export", icon="download", button_style="primary")
        self._start.on_click(self.guarded(lambda _: self.export()))
        self._said = ipywidgets.HTML()
        self._files = ipywidgets.HTML()
        self._files.add_class("qlab-report")
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.history_changed, self._say)
        bar = ipywidgets.HBox(
            [self._path, self._encodings, *self._formats.values(), self._start],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.display(bar, self._said, self._files)
        self._say()

    def export(self) -> Job:
        """Starts writing, from a copy of the sim; raises ValueError without a path or anything to write."""
        path = self._path.value.strip()
        formats = tuple(name for name, box in self._formats.items() if box.value)
        if not path or not formats:
            raise ValueError("an export needs a path, and at least one kind of file.")
        self._job = self._lab.start(Export(path, self._encodings.value, formats))
        return self._job

    def redraw(self) -> None:
        """Shows what was written."""
        if self.exported is not None:
            rows = "".join(
                f"<tr><td>{escape(path)}</td><td>{size / 1024:,.0f} KiB</td></tr>"
                for path, size in self.exported.files.items()
            )
            head = '<th scope="col">file</th><th scope="col">size</th>'
            self._files.value = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        self._say()

    def to_html(self) -> str:
        """What was written."""
        return f"{self._said.value}{self._files.value}"

    def _started(self, job: Job) -> None:
        if job is self._job:
            self._said.value = "<span role='status'>Writing.</span>"

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, Exported):
            self.exported, self._moment = job.value, moment_of(self._lab)
            self.redraw_soon()
        elif job is self._job:
            self._say()
            if job.exception is not None and not isinstance(job.exception, Cancelled):
                self.frame.show(job.exception)

    def _say(self) -> None:
        text = "Nothing written yet." if self.exported is None else f"{len(self.exported.files)} files written."
        if self.exported is not None and self._moment != moment_of(self._lab):
            text += " The sim changed since."
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(text)}</span>"
