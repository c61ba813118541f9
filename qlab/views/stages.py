"""Stages: AutoQuant while it runs, as a table and a decision tree that grow; a stage can be vetoed or forced."""

import math
from collections.abc import Callable

import ipywidgets
import pandas as pd

from qlab.errors import Cancelled, InputError
from qlab.lab import Lab
from qlab.lab.jobs import Job, JobState
from qlab.plots import decision_tree
from qlab.techniques import TECHNIQUES, AutoQuant, AutoQuantResult, StageRecord, Steering
from qlab.techniques.stages import stage_table
from qlab.views.bokeh_pane import BokehPane
from qlab.views.tabs import tab
from qlab.views.view import View, escape

_HEAD = ("stage", "score", "interval", "gain", "seconds", "verdict", "why")


@tab("AutoQuant", place=22)
class Stages(View):
    """The stages of the AutoQuant that the lab runs or ran last, whoever started it; `records` are they.

    A click on a box names its stage, or type one that is still to come, such as AdaRound: Veto ends it and takes it out
    of the choice, Force keeps it whatever its score. Cancel returns the best so far. The lab goes on with what was
    found, as one step; `result` is all of it, None before.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.records: list[StageRecord] = []
        self.result: AutoQuantResult | None = None
        self._steering: Steering | None = None
        self._followed: Job | None = None
        self._is_drawing = False
        default = AutoQuant()
        self._drop = _text("allowed drop", f"{default.allowed_drop:g}", 84, 150, "of the score against float")
        self._techniques = _text("techniques", ", ".join(default.techniques), 72, 420, "names, in order")
        self._folder = _text("save in", "", 50, 220, "a folder for model, encodings and report; none: not saved")
        self._start = self._button("Find", "play", self.find, "the best combination of techniques")
        self._start.button_style = "primary"
        self._stage = ipywidgets.Combobox(description="stage", placeholder="click a box, or type a name")
        self._stage.style.description_width, self._stage.layout.width = "38px", "300px"
        self._veto = self._button("Veto", "ban", self.veto, "leave the stage out, now or when it comes")
        self._force = self._button("Force", "thumb-tack", self.force, "keep the stage whatever its score")
        self._cancel = self._button("Cancel", "stop", self.cancel, "end with the best so far")
        self._said, self._steered = ipywidgets.HTML(), ipywidgets.HTML()
        self._table = ipywidgets.HTML(layout=ipywidgets.Layout(max_height="320px", overflow="auto"))
        self._table.add_class("qlab-report")
        self._figure = decision_tree(stage_table([]), score_name=self._score_name)
        self.pane = BokehPane(self._figure.figure, fallback=self._figure.to_svg, label=self._figure.headline)
        self._figure.source.selected.on_change("indices", self.guarded(self._clicked))
        self.listen(lab.events.job_published, self._published)
        self.listen(lab.events.job_ended, self._ended)
        self.display(
            _row(self._drop, self._techniques, self._folder, self._start),
            self._said,
            _row(self._stage, self._veto, self._force, self._cancel, self._steered),
            self.pane,
            self._table,
        )
        self._say("Not run yet: find the best combination of techniques for a target, every step in view.")
        self.redraw()

    def find(self) -> Job:
        """Starts AutoQuant in the background; raises SettingError for what is refused."""
        text = self._drop.value.strip()
        try:
            drop: float | str = float(text)
        except ValueError:
            drop = text  # refused with the range that is allowed
        technique = AutoQuant(
            allowed_drop=drop,  # type: ignore[arg-type]
            techniques=self._techniques.value,
            save_dir=self._folder.value.strip() or None,
        )
        return self._lab.start(technique)

    def veto(self) -> None:
        """Leaves the named stage out; raises InputError where none is named or nothing runs."""
        self._in_force().veto(self._named())
        self._show_steering()

    def force(self) -> None:
        """Keeps the named stage whatever its score; raises InputError where none is named or nothing runs."""
        self._in_force().force(self._named())
        self._show_steering()

    def cancel(self) -> None:
        """Ends the search; the lab goes on with the best so far."""
        if self._followed is not None:
            self._followed.cancel()

    def redraw(self) -> None:
        """Shows the stages that there are."""
        records = list(self.records)
        lineage = () if self.result is None else self.result.lineage
        frame = stage_table(records, lineage)
        target = None if self.result is None else self.result.target
        self._is_drawing = True
        try:
            with self.pane.batch():
                self._figure.update(frame, target=target)
        finally:
            self._is_drawing = False
        self.pane.label = self._figure.headline
        self.pane.layout.display = None if records else "none"
        self._table.value = _table(frame) if records else ""
        names = [record.stage for record in records]
        self._stage.options = tuple(dict.fromkeys([*names, *(n for n in TECHNIQUES if n != "AutoQuant")]))
        self._show_steering()

    def to_html(self) -> str:
        """The stages as they are."""
        return f"{self._said.value}{self._table.value}{self.pane.to_html() if self.records else ''}"

    @property
    def _score_name(self) -> str:
        return "agreement" if self._lab.score is None else self._lab.score.name

    def _published(self, job: Job, record: object) -> None:
        if not isinstance(record, StageRecord):
            return
        if job is not self._followed:
            self._followed, self.records, self.result = job, [], None
        self._steering = record.steering
        names = [known.stage for known in self.records]
        if record.stage in names:
            self.records[names.index(record.stage)] = record
        else:
            self.records.append(record)
        if record.verdict == "running":
            self._say(f"{record.stage} is running.")
        self.redraw_soon()

    def _ended(self, job: Job) -> None:
        if job is not self._followed:
            return
        self._steering = None
        if isinstance(job.value, AutoQuantResult):
            self.result, self.records = job.value, list(job.value.records)
            notes = "".join(f"<li>{escape(note)}</li>" for note in job.value.notes)
            self._say(job.value.summary, f"<ul>{notes}</ul>" if notes else "")
        elif isinstance(job.exception, Cancelled):
            self._say("Cancelled before anything was found. The sim is as it was.")
        elif job.state is JobState.FAILED and job.exception is not None:
            self._say(f"It failed: {job.exception}")
            self.frame.show(job.exception)
        self.redraw_soon()

    def _clicked(self, _attr: str, _old: object, new: list[int]) -> None:
        if not self._is_drawing and new:
            self._stage.value = str(self._figure.source.data["stage"][new[0]])

    def _show_steering(self) -> None:
        steering = self._steering
        for button in (self._veto, self._force, self._cancel):
            button.disabled = steering is None
        told = [] if steering is None else [
            f"{word}: {', '.join(sorted(names))}"
            for word, names in (("vetoed", steering.vetoed), ("forced", steering.forced))
            if names
        ]  # fmt: skip
        self._steered.value = f"<span class='qlab-quiet' role='status'>{escape('; '.join(told))}</span>"

    def _in_force(self) -> Steering:
        if self._steering is None:
            raise InputError("no AutoQuant runs: Find starts one, or lab.start(qlab.AutoQuant()).")
        return self._steering

    def _named(self) -> str:
        name = self._stage.value.strip()
        if not name:
            raise InputError("name a stage: click its box, or type a technique that is still to come.")
        return name

    def _button(self, name: str, icon: str, action: Callable[[], object], help: str) -> ipywidgets.Button:
        button = ipywidgets.Button(description=name, icon=icon, tooltip=help, layout=ipywidgets.Layout(width="86px"))
        button.on_click(self.guarded(lambda _: action()))
        return button

    def _say(self, sentence: str, more: str = "") -> None:
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(sentence)}</span>{more}"


def _table(frame: pd.DataFrame) -> str:
    """The stages as a table, those that lead to the result in bold."""
    rows = []
    for row in frame.itertuples():
        cells = (
            row.stage,
            _number(row.score, ".4f"),
            f"{row.low:.4f} to {row.high:.4f}" if math.isfinite(row.low) else "",
            _number(row.gain, "+.4f"),
            _number(row.seconds, ".1f") if row.verdict != "running" else "",
            row.verdict,
            row.reason,
        )
        name, *numbers, why = map(escape, cells)
        shown = f"<td>{f'<b>{name}</b>' if row.is_best else name}</td>" + "".join(
            f"<td>{cell}</td>" for cell in numbers
        )
        shown += f"<td style='white-space:normal;min-width:280px'>{why}</td>"
        rows.append(f"<tr>{shown}</tr>")
    head = "".join(f'<th scope="col">{name}</th>' for name in _HEAD)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


def _text(name: str, value: str, label: int, width: int, help: str) -> ipywidgets.Text:
    field = ipywidgets.Text(value=value, description=name, tooltip=help)
    field.style.description_width, field.layout.width = f"{label}px", f"{width}px"
    return field


def _row(*widgets: ipywidgets.Widget) -> ipywidgets.HBox:
    return ipywidgets.HBox(
        list(widgets), layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 8px")
    )
