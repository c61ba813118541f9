"""Export: the files that a target reads, whether the target agrees, and how others' encodings compare.

All three run in the background on a copy of the sim, in the state that the lab is in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ipywidgets
import pandas as pd

from qlab.errors import Cancelled
from qlab.export.compare_encodings import SAME, compare_encodings
from qlab.export.encodings_write import VERSIONS
from qlab.export.export import FORMATS, Exported
from qlab.export.on_target import OnTarget, on_target
from qlab.lab import Lab
from qlab.lab.jobs import Job
from qlab.progress import Progress
from qlab.sim import QuantSim
from qlab.views.moment import Moment, moment_of
from qlab.views.tabs import tab
from qlab.views.view import View, escape

_SHOWN_ROWS = 200
_FORMATS = {
    "onnx": "the Q/DQ model, and the float one beside it",
    "encodings": "scales and zero points as AIMET writes them",
    "safetensors": "the weights by the names that they have in the model",
    "program": "a PyTorch program with its quantize operators (.pt2)",
}


@dataclass(frozen=True)
class FileExport:
    """Writing the files as an analysis, which a lab runs on a copy of its sim."""

    path: str
    encodings: str
    formats: tuple[str, ...]
    weights: str = "float"

    @property
    def __name__(self) -> str:
        return "export"

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> Exported:
        """The files written; data and score are not asked."""
        return sim.export(self.path, self.encodings, self.weights, self.formats, progress)


@dataclass(frozen=True)
class TargetCheck:
    """Running the file on target, as an analysis: with the lab's batches and score."""

    path: str
    layers: bool
    optimised: bool

    @property
    def __name__(self) -> str:
        return "check on target"

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> OnTarget:
        """The file beside the sim."""
        return on_target(
            sim, self.path, batches, score, layers=self.layers, optimised=self.optimised, progress=progress
        )


@dataclass(frozen=True)
class EncodingsComparison:
    """Reading another's encodings, as an analysis."""

    path: str

    @property
    def __name__(self) -> str:
        return "compare encodings"

    def measure(self, sim: QuantSim, batches: Any, score: Any, progress: Progress) -> pd.DataFrame:
        """The grids side by side; data and score are not asked."""
        return compare_encodings(sim, self.path)


@tab("Export", place=60)
class Export(View):
    """Where to and which files; the check on target; the comparison with others' encodings.

    `exported`, `checked`, `compared`: what came of them last, None before.
    """

    def __init__(self, lab: Lab, path: str = "exported/model") -> None:
        super().__init__(lab)
        self._lab = lab
        self.exported: Exported | None = None
        self.checked: OnTarget | None = None
        self.compared: pd.DataFrame | None = None
        self._jobs: list[Job] = []
        self._moment: Moment = ()
        self._path = _text(path, "path", 40, 330)
        self._path.tooltip = "folder and name, without a suffix"
        self._encodings = ipywidgets.Dropdown(options=list(VERSIONS), description="encodings")
        self._encodings.value = "1.0.0"
        self._encodings.tooltip = "version of the encodings file"
        self._encodings.style.description_width, self._encodings.layout.width = "84px", "178px"
        self._formats = {name: _box(name, name != "program", 116, _FORMATS[name]) for name in FORMATS}
        self._integers = _box("integer weights", False, 136, "store weights as integers, not as float ones on the grid")
        self._layers = _box("every layer", False, 110, "compare the output of every layer, not of the model alone")
        self._optimised = _box("integer kernels", True, 136, "let ONNX Runtime use integer kernels, as a target does")
        self._other = _text("", "other", 40, 420)
        self._other.placeholder = "a Q/DQ model (.onnx) or an encodings file"
        self._said, self._files, self._target, self._compared = (ipywidgets.HTML() for _ in range(4))
        for table in (self._files, self._target, self._compared):
            table.add_class("qlab-report")
            table.layout.max_height, table.layout.overflow = "320px", "auto"
        self.listen(lab.events.job_started, self._started)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.history_changed, self._say)
        boxes = (*self._formats.values(), self._integers)
        self.display(
            _row(self._path, self._encodings),
            _row(*boxes, self._button("Export", "download", self.export)),
            self._said,
            self._files,
            _row(self._layers, self._optimised, self._button("Check on target", "microchip", self.check)),
            self._target,
            _row(self._other, self._button("Compare", "balance-scale", self.compare)),
            self._compared,
        )
        self._say()

    def export(self) -> Job:
        """Starts writing, from a copy of the sim; raises ValueError without a path or anything to write."""
        path = self._path.value.strip()
        formats = tuple(name for name, box in self._formats.items() if box.value)
        if not path or not formats:
            raise ValueError("an export needs a path, and at least one kind of file.")
        weights = "integer" if self._integers.value else "float"
        return self._start(FileExport(path, self._encodings.value, formats, weights))

    def check(self) -> Job:
        """Starts running the exported file on target; raises ValueError without a path."""
        path = self._path.value.strip()
        if not path:
            raise ValueError("a check needs the path of an export.")
        return self._start(TargetCheck(f"{path}.onnx", self._layers.value, self._optimised.value))

    def compare(self) -> Job:
        """Starts comparing with the other encodings; raises ValueError without a path."""
        path = self._other.value.strip()
        if not path:
            raise ValueError("a comparison needs the path of a Q/DQ model (.onnx) or of an encodings file.")
        return self._start(EncodingsComparison(path))

    def redraw(self) -> None:
        """Shows what was written, measured and compared."""
        if self.exported is not None:
            rows = [(path, f"{size / 1024:,.0f} KiB") for path, size in self.exported.files.items()]
            self._files.value = _table(("file", "size"), rows)
        if self.checked is not None:
            self._target.value = self.checked._repr_html_()
        if self.compared is not None:
            self._compared.value = _comparison(self.compared)
        self._say()

    def to_html(self) -> str:
        """What was written, measured and compared."""
        return "".join(part.value for part in (self._said, self._files, self._target, self._compared))

    def _start(self, work: Any) -> Job:
        job = self._lab.start(work)
        self._jobs = [*(j for j in self._jobs if not j.state.is_over), job]
        return job

    def _started(self, job: Job) -> None:
        if job in self._jobs:
            self._said.value = f"<span role='status'>Running: {escape(job.title)}.</span>"

    def _ended(self, job: Job) -> None:
        if isinstance(job.value, Exported):
            self.exported, self._moment = job.value, moment_of(self._lab)
        elif isinstance(job.value, OnTarget):
            self.checked = job.value
        elif job in self._jobs and isinstance(job.value, pd.DataFrame):
            self.compared = job.value
        elif job in self._jobs:
            self._say()
            if job.exception is not None and not isinstance(job.exception, Cancelled):
                self.frame.show(job.exception)
            return
        else:
            return
        self.redraw_soon()

    def _say(self) -> None:
        text = "Nothing written yet." if self.exported is None else f"{len(self.exported.files)} files written."
        if self.exported is not None and self._moment != moment_of(self._lab):
            text += " The sim changed since."
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(text)}</span>"

    def _button(self, title: str, icon: str, action: Callable[[], Job]) -> ipywidgets.Button:
        style = "primary" if title == "Export" else ""
        button = ipywidgets.Button(description=title, icon=icon, button_style=style)
        button.layout.width = "auto"
        button.on_click(self.guarded(lambda _: action()))
        return button


def _text(value: str, title: str, label: int, width: int) -> ipywidgets.Text:
    text = ipywidgets.Text(value=value, description=title)
    text.style.description_width, text.layout.width = f"{label}px", f"{width}px"
    return text


def _box(title: str, value: bool, width: int, help: str) -> ipywidgets.Checkbox:
    box = ipywidgets.Checkbox(value=value, description=title, indent=False, tooltip=help)
    box.layout.width = f"{width}px"
    return box


def _row(*widgets: ipywidgets.Widget) -> ipywidgets.HBox:
    return ipywidgets.HBox(widgets, layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"))


def _comparison(frame: pd.DataFrame) -> str:
    """What differs, and how many do not."""
    shown = frame[frame["state"] != SAME]
    columns = ("tensor", "other", "state", "scale", "other_scale", "zero_point", "other_zero_point", "note")
    rows = [tuple(_cell(value) for value in row) for row in shown[list(columns)].head(_SHOWN_ROWS).values]
    said = f"<p role='status'>{len(frame) - len(shown)} grids are the same, {len(shown)} are not.</p>"
    more = f"<p>{len(shown) - _SHOWN_ROWS} more in qlab.compare_encodings(...)</p>" if len(shown) > _SHOWN_ROWS else ""
    return said + (_table(columns, rows) if rows else "") + more


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
