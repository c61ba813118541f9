"""Training: loss and score while QAT runs, the range of the selected layer, and changes before the next epoch."""

import time
from collections.abc import Callable

import ipywidgets
import pandas as pd

from qlab.errors import Cancelled, InputError
from qlab.lab import Lab
from qlab.lab.jobs import Job, JobState
from qlab.plots import range_history, training
from qlab.techniques import TrainingControl, TrainingStep
from qlab.views.bokeh_pane import BokehPane
from qlab.views.tabs import tab
from qlab.views.view import View, escape

DRAW_EVERY_S = 0.25
_COLUMNS = [name for name in TrainingStep.__dataclass_fields__ if name != "control"]


@tab("Training", place=37)
class Training(View):
    """The curves of the training that the lab runs or ran last, whoever started it; `steps` are its records.

    The range is that of the layer selected in the lab, from the moment of its selection; the share of values that it
    clips is counted in the batch of each step. While a training runs, the selected layer can be given other bits or
    frozen before the next epoch: `set_bits`, `freeze`.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.steps: list[TrainingStep] = []
        self._control: TrainingControl | None = None
        self._job: Job | None = None
        self._drawn = 0.0
        self._said = ipywidgets.HTML()
        self._layer = ipywidgets.HTML()
        self._waiting = ipywidgets.HTML()
        self._bits = {part: _bits_field(part) for part in ("weight", "output")}
        self._buttons = [
            self._button("Set bits", "sliders", self._set_bits_typed, "before the next epoch"),
            self._button("Freeze", "lock", lambda: self.freeze(), "the layer trains no further from the next epoch on"),
            self._button("Unfreeze", "unlock", lambda: self.freeze(False), "the layer trains again"),
        ]
        score_name = "score" if lab.score is None else lab.score.name
        self._curves = training(pd.DataFrame({"step": [], "loss": []}), score_name=score_name)
        self._range = range_history(pd.DataFrame({"step": [], "low": [], "high": []}))
        self.curves = BokehPane(self._curves.figure, fallback=self._curves.to_svg)
        self.range = BokehPane(self._range.figure, fallback=self._range.to_svg)
        for pane in (self.curves, self.range):
            pane.layout.flex, pane.layout.min_width = "1 1 420px", "0"
        self.listen(lab.events.job_published, self._published)
        self.listen(lab.events.job_ended, self._ended)
        self.listen(lab.events.selected, lambda _: self._follow())
        panes = ipywidgets.HBox([self.curves, self.range], layout=ipywidgets.Layout(flex_flow="row wrap"))
        bar = ipywidgets.HBox(
            [self._layer, *self._bits.values(), *self._buttons, self._waiting],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 8px"),
        )
        self.display(self._said, bar, panes)
        self._say("No training yet: run QAT, in the tab Techniques or with lab.start(qlab.QAT(...)).")
        self._follow()
        self.redraw()

    @property
    def layer(self) -> str | None:
        """The layer whose range is followed: the first of those selected."""
        return self._lab.selected[0] if self._lab.selected else None

    def set_bits(self, part: str, bits: int) -> None:
        """Gives the selected layer's 'weight' or 'output' other bits before the next epoch."""
        self._steered().set_bits(self._selected(), part, bits)
        self._show_waiting()

    def freeze(self, frozen: bool = True) -> None:
        """Lets the selected layer train no further from the next epoch on, or (False) again."""
        self._steered().freeze(self._selected(), frozen)
        self._show_waiting()

    def redraw(self) -> None:
        """Shows the steps that were taken."""
        rows = [{name: getattr(step, name) for name in _COLUMNS} for step in list(self.steps)]
        frame = pd.DataFrame(rows, columns=_COLUMNS)
        frame.loc[frame["score"].notna(), "loss"] = None  # the mean of an epoch is no step of the curve
        frame = frame.astype(dict.fromkeys(("loss", "score", "low", "high", "clipped"), float))
        with self.curves.batch():
            self._curves.update(frame)
        self.curves.label = self._curves.headline
        self.curves.layout.display = None if len(frame) else "none"
        ranges = frame[frame["low"].notna()]
        followed = ranges["layer"].iloc[-1] if len(ranges) else ""
        ranges = ranges[ranges["layer"] == followed]
        with self.range.batch():
            self._range.update(ranges, name=f"{followed} {ranges['part'].iloc[-1]}" if len(ranges) else "")
        self.range.label = self._range.headline
        self.range.layout.display = None if len(ranges) else "none"

    def to_html(self) -> str:
        """The curves as they are."""
        followed = self.range.to_html() if len(self._range.steps.data["step"]) else ""
        return self._said.value + (self.curves.to_html() if self.steps else "") + followed

    def _published(self, job: Job, record: object) -> None:
        if not isinstance(record, TrainingStep):
            return
        if job is not self._job:
            self._job, self.steps, self._control = job, [], record.control
            self._follow()
        self.steps.append(record)
        if record.score is not None:
            self._show_waiting()
        now = time.monotonic()
        if record.score is not None or now - self._drawn >= DRAW_EVERY_S:  # nothing may follow an epoch for long
            self._drawn = now
            self._say(f"{job.title}, epoch {record.epoch + 1}, step {record.step}.")
            self.redraw_soon()

    def _ended(self, job: Job) -> None:
        if job is not self._job:
            return
        self._control = None
        self._follow()
        if job.report is not None:
            self._say(f"{job.title}: {job.report.summary}")
        elif isinstance(job.exception, Cancelled):
            self._say("Cancelled. The sim is as it was.")
        elif job.state is JobState.FAILED:
            self._say(f"It failed: {job.exception}")
        self.redraw_soon()

    def _follow(self) -> None:
        """Follows the selected layer, and shows what it can be given."""
        name, control = self.layer, self._control
        if control is not None and name is not None:
            control.follow = name
        for part, field in self._bits.items():
            quantizer = None if name is None else getattr(self._lab.sim[name], part)
            field.disabled = control is None or quantizer is None
            field.layout.display = "none" if quantizer is None else None
            if quantizer is not None:
                field.value = quantizer.bits
        for button in self._buttons:
            button.disabled = control is None or name is None
        told = "select a layer to see its range" if name is None else name
        self._layer.value = f"<span class='qlab-quiet'>layer</span> <b>{escape(told)}</b>"
        self._show_waiting()

    def _set_bits_typed(self) -> None:
        sim, name = self._lab.sim, self._selected()
        for part, field in self._bits.items():
            quantizer = getattr(sim[name], part)
            if not field.disabled and quantizer is not None and field.value != quantizer.bits:
                self.set_bits(part, field.value)

    def _show_waiting(self) -> None:
        waiting = [] if self._control is None else self._control.waiting
        told = f"Before the next epoch: {'; '.join(waiting)}." if waiting else ""
        self._waiting.value = f"<span class='qlab-quiet' role='status'>{escape(told)}</span>"

    def _steered(self) -> TrainingControl:
        if self._control is None:
            raise InputError("no training runs: start one with lab.start(qlab.QAT(...)).")
        return self._control

    def _selected(self) -> str:
        if self.layer is None:
            raise InputError("no layer is selected: lab.select('name'), or a click in the table of layers.")
        return self.layer

    def _button(self, name: str, icon: str, action: Callable[[], object], help: str) -> ipywidgets.Button:
        button = ipywidgets.Button(description=name, icon=icon, tooltip=help, layout=ipywidgets.Layout(width="100px"))
        button.on_click(self.guarded(lambda _: action()))
        return button

    def _say(self, sentence: str) -> None:
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(sentence)}</span>"


def _bits_field(part: str) -> ipywidgets.BoundedIntText:
    field = ipywidgets.BoundedIntText(value=8, min=2, max=16, description=f"{part} bits")
    field.style.description_width, field.layout.width = "76px", "140px"
    return field
