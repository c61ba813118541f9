"""Lab, the observable experiment: every action goes through it, is announced, can be undone, and is kept as Python."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qlab.errors import Busy, HistoryError, InputError
from qlab.lab.code import plain
from qlab.lab.events import LabEvents
from qlab.lab.given import Given
from qlab.lab.histogram import HistogramData, channels_of, error_curve, histogram_of
from qlab.lab.jobs import Job, worker_of
from qlab.lab.journal import Configure, Edit, Set, SetRange, quantizer_of
from qlab.lab.measuring import Measuring
from qlab.lab.rows import LayerRow, differences, size_bytes, table
from qlab.lab.scores import Scoreboard, Scores
from qlab.lab.script import beginning_of, script_of
from qlab.lab.showing import missing_note, module_of_views
from qlab.lab.state import LabState
from qlab.lab.tasks import Task, calibration, task_of
from qlab.progress import Bar
from qlab.quantization import Quantizer
from qlab.sim import Evaluation, QuantSim


class Lab:
    """A sim with everything a person does to it: verbs, events, scores, background jobs, undo, and a script.

    sim: changed in place by the verbs; calibrated with `batches` if it is not. batches: any iterable of inputs, what
    techniques work on. score: an Evaluation or a function of a model, measured on all its data. probe_batches: how
    many of the batches give true values after an edit. max_bytes: budget for values remembered on them.
    max_history_bytes: budget for weights remembered to undo techniques. script_path: a file that is kept equal to
    `script()` after every step, so that a kernel that died can be brought back to where it was.

    `lab.sim[...]` may be changed directly as well: the next verb, or `refresh`, notices and journals it.
    `lab.events`: the signals, see LabEvents. `lab.live`: measure in the background after every change; views switch it
    on. `lab.selected`: names of the selected layers.
    """

    def __init__(
        self,
        sim: QuantSim,
        batches: Any,
        score: Evaluation | Callable[[Any], Any] | None = None,
        probe_batches: int = 2,
        max_bytes: int = 1 << 30,
        max_history_bytes: int = 1 << 30,
        script_path: str | Path | None = None,
    ) -> None:
        self.sim = sim
        self._worker = worker_of(sim)
        self._refuse_when_busy()
        self._given = Given(batches, score)
        self.batches = self._given.batches
        self.score = self._given.evaluation
        self.events = LabEvents()
        self.live = False
        self.selected: tuple[str, ...] = ()
        if any(isinstance(q, Quantizer) and q.encoding is None for q in sim.quantizers.values()):
            with Bar("calibrating") as bar:
                sim.calibrate(self.batches, progress=bar)
        probe = list(islice(self.batches, probe_batches))
        if not probe:
            raise InputError("a Lab needs at least one batch to look at; the iterable was empty.")
        self._beginning = beginning_of(sim, self._given.known)
        self._lock = self._worker.lock
        board = Scoreboard(sim, probe, self.score, self._lock, max_bytes)
        self._state = LabState(sim, board, self._lock, max_history_bytes, self._given.known)
        self._measure = Measuring(self._state, self.events)
        self._measuring: Job | None = None
        self._dashboard: Any = None
        self._script_path = None if script_path is None else Path(script_path)
        self._keep_script()

    # Edits: immediate -------------------------------------------------------------------------------------------------

    def set(self, layers: str | Iterable[str], part: str, **settings: Any) -> None:
        """Changes settings of one part, 'weight' or 'output', of layers given by name, by glob, or as several names.

        settings: bits, scheme, granularity, rule, enabled, frozen. All are changed or, where one is refused, none.
        """
        asked = {key: plain(value) for key, value in settings.items()}
        if isinstance(layers, str) and layers not in self.sim.placed and part in ("weight", "output"):
            self._edit(Configure(layers, **{part: asked}))
        else:
            self._edit(Set((layers,) if isinstance(layers, str) else tuple(layers), part, asked))

    def set_range(
        self, layer: str, part: str, low: float | Sequence[float] | Tensor, high: float | Sequence[float] | Tensor
    ) -> None:
        """Sets the range of one part of a layer and freezes it; a bound is a number, or one number for each channel."""
        self._edit(SetRange(layer, part, _bound(low), _bound(high)))

    def configure(
        self, pattern: str, weight: dict[str, Any] | None = None, output: dict[str, Any] | None = None
    ) -> None:
        """Changes settings of every layer that matches a glob, as `QuantSim.configure`."""
        weight_, output_ = ({key: plain(value) for key, value in (part or {}).items()} for part in (weight, output))
        self._edit(Configure(pattern, weight_, output_))

    def select(self, layers: str | Iterable[str]) -> None:
        """Selects layers by name, by glob, or as several names (none for nothing). Not a step of the history."""
        if not isinstance(layers, str):
            selected = tuple(self.sim[name].name for name in layers)
        elif layers in self.sim.placed:
            selected = (layers,)
        else:
            selected = tuple(layer.name for layer in self.sim.matching(layers) if layer.name in self._state.rows.names)
        if selected != self.selected:
            self.selected = selected
            self.events.send("selected", selected)

    def refresh(self) -> None:
        """Notices what was changed on `lab.sim` directly and journals it, so that undo and script stay true.

        Every verb begins with it; views call it after each cell. While a job changes the sim it does nothing.
        """
        if not self.is_busy:
            with self._editing():
                pass

    # Work: in a thread ------------------------------------------------------------------------------------------------

    def run(self, work: Any, batches: Any = None, score: Any = None) -> Any:
        """Runs a technique, an analysis or a function to its end, with a bar; returns its Report or value.

        batches, score: those of the lab unless given. Ctrl-C, Cancel or an error leaves everything as it was.
        """
        self._refuse_inside("run", "Use lab.start, which returns at once.")
        return _finish(self.start(work, batches, score))

    def start(self, work: Any, batches: Any = None, score: Any = None) -> Job:
        """Starts a technique, an analysis or a function in the background and returns its Job at once.

        A technique changes the sim and becomes a step; edits are refused meanwhile. An analysis (it has `measure`) gets
        a copy of the sim, so edits go on. A function is called with (sim, progress) and may change the sim; it becomes
        a step that the script cannot write. Jobs run one after the other.
        """
        return self._launch(task_of(self._state, self._given, work, batches, score, self._announce_all))

    def calibrate(self, batches: Any = None) -> None:
        """Finds every range again from new statistics, as `QuantSim.calibrate`; with a bar. One step of the history."""
        self._refuse_inside("calibrate", "Calibrate before or after it.")
        _finish(self._launch(calibration(self._state, self._given, batches, self._announce_all)))

    def measure(self) -> Job:
        """Measures in the background what is stale: probe batches, noise of layers, then the score on all data.

        `lab.measure().result()` waits and returns the Scores. An edit meanwhile makes it begin again.
        """
        self.refresh()
        with self._lock:
            job = self._measuring
            if job is None or job.state.is_over or job.is_cancelling or self._measure.has_finished:
                self._measure.has_finished = False
                job = self._measuring = self._launch(Task("measure", self._measure, changes=False))
        return job

    @property
    def jobs(self) -> list[Job]:
        """The job that runs and those that wait."""
        return self._worker.jobs

    @property
    def is_busy(self) -> bool:
        """Whether a job is changing the sim, so that edits are refused."""
        return self._worker.changing is not None

    # Past -------------------------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Takes the last step back; raises HistoryError where there is none."""
        with self._editing() as edited:
            if self.step == 0:
                raise HistoryError("there is nothing to undo.")
            edited += self._state.go_to(self.step - 1)

    def redo(self) -> None:
        """Takes the last undo back; raises HistoryError where there is none."""
        with self._editing() as edited:
            if self.step + 1 == len(self._state.history.steps):
                raise HistoryError("there is nothing to redo.")
            edited += self._state.go_to(self.step + 1)

    def go_to(self, step: int) -> None:
        """Returns to the state after step number `step` of the history; 0 is the beginning."""
        with self._editing() as edited:
            edited += self._state.go_to(step)

    @property
    def step(self) -> int:
        """The number of the step whose state the sim is in."""
        return self._state.history.position

    @property
    def action(self) -> str:
        """What led to the present state, in one line."""
        return self._state.history.current.label

    @property
    def can_undo(self) -> bool:
        """Whether `undo` has somewhere to go."""
        return self.step > 0 and self._state.history.is_reachable(self.step - 1)

    @property
    def can_redo(self) -> bool:
        """Whether `redo` has somewhere to go."""
        history = self._state.history
        return self.step + 1 < len(history.steps) and history.is_reachable(self.step + 1)

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: step, action, verb, sqnr, agreement, score, size_bytes, is_current, is_undone, is_reachable,
        seconds; scores are missing where none was measured in that state."""
        return self._state.history.to_pandas()

    def compare(self, step_a: int, step_b: int) -> pd.DataFrame:
        """Per-layer differences between two steps: one row (layer, setting, before, after) for each that differs."""
        history = self._state.history
        return differences(history.rows_at(step_a), history.rows_at(step_b))

    def script(self) -> str:
        """Python that reproduces the state where `model`, `example`, `batches` (and `score`) are defined."""
        self.refresh()
        return script_of(self._beginning, self._state.history.actions)

    # What there is to see ---------------------------------------------------------------------------------------------

    def layers(self) -> pd.DataFrame:
        """One row a layer (see LayerRow), and its `noise`: see the property, NaN where it was not measured."""
        with self._lock:
            frame = table(self._state.rows.rows())
        noise = self.noise
        frame["noise"] = [noise.get(name, float("nan")) for name in frame["name"]]
        return frame

    def layer_row(self, name: str) -> LayerRow:
        """One row of `layers`, without the measured noise; cheap. Raises UnknownLayer."""
        with self._lock:
            return self._state.rows.row(name)

    @property
    def noise(self) -> dict[str, float]:
        """SQNR in dB of each layer's value on the first probe batch against the float model, as measured last."""
        return self._state.history.latest_noise()

    def histogram(
        self,
        layer: str,
        part: str = "weight",
        *,
        channel: int | None = None,
        bins: int = 128,
        bounds: tuple[float, float] | None = None,
    ) -> HistogramData:
        """The values of a weight or an output before and after rounding, its grid and its range.

        channel: one channel alone. bounds: (low, high), what `set_range` would give, without setting it.
        """
        with self._lock, torch.no_grad():
            return histogram_of(quantizer_of(self.sim, layer, part), layer, part, channel, bins, bounds)

    def channels(self, part: str = "weight") -> pd.DataFrame:
        """The ranges of the channels of all weights or outputs: columns layer, channel, min, max, low, high."""
        with self._lock, torch.no_grad():
            return channels_of(self.sim, part)

    def error_curve(self, layer: str, part: str = "weight", points: int = 64) -> pd.DataFrame:
        """The mean squared error if the range were clipped at `clip`: columns clip, low, high, error."""
        with self._lock, torch.no_grad():
            return error_curve(quantizer_of(self.sim, layer, part), points)

    def size(self) -> int:
        """The bytes of all parameters at their present bits; those that are not quantized take 4 bytes a number."""
        with self._lock:
            return size_bytes(self.sim)

    @property
    def scores(self) -> Scores:
        """SQNR and agreement on the probe batches and the score on all data: float, quantized, change.

        Measures what is stale first, and waits. When `live`, or while a job changes the sim, it never waits: it returns
        what is known, each stale row marked.
        """
        if not (self.live or self.is_busy or self._worker.is_here):
            self.refresh()
            if self._state.missing:
                return _finish(self.measure())
        return self.known_scores

    @property
    def known_scores(self) -> Scores:
        """The scores as they are known, without measuring; never waits."""
        return self._measure.scores()

    @property
    def scores_are_stale(self) -> bool:
        """Whether a score belongs to an earlier state."""
        return bool(self._state.missing)

    def save_html(self, path: str | Path) -> Path:
        """Writes a static page for a colleague, opening offline: scores, layers, the worst histograms, history."""
        from qlab.lab.page import save_page

        return save_page(self, path)

    def __repr__(self) -> str:
        layers, steps = len(self._state.rows.names), len(self._state.history.steps) - 1
        return f"Lab({self.sim.preset.name}, {layers} layers, {self.size():,} bytes, step {self.step} of {steps})"

    def to_html(self) -> str:
        """Scores and layers as plain tables, every name escaped: what a notebook shows where no widgets are."""
        from qlab.lab.page import static_html

        return static_html(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        """The dashboard in a notebook that has widgets, else the static tables."""
        if self._dashboard is None or self._dashboard.comm is None:  # one for all cells; a new one after close()
            views = module_of_views()
            self._dashboard = None if views is None else views.Dashboard(self)
        if self._dashboard is not None:
            return self._dashboard._repr_mimebundle_(include=include, exclude=exclude)
        note = missing_note()
        plain = f"{self!r}\n{note}" if note else repr(self)
        return {"text/plain": plain, "text/html": self.to_html() + (f"<p>{note}</p>" if note else "")}

    # Within -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _editing(self) -> Iterator[list[str]]:
        """Holds the lock for an edit, refused while a job changes the sim; announces the layers put into the list."""
        self._refuse_when_busy()
        edited: list[str] = []
        with self._lock:
            self._refuse_when_busy()
            before = self._state.history.current
            edited += self._state.notice()
            try:
                yield edited
            finally:
                changed = self._state.history.current is not before
        if changed:
            self._announce(tuple(dict.fromkeys(edited)))

    def _edit(self, edit: Edit) -> None:
        with self._editing() as edited:
            edited += self._state.edit(edit)

    def _refuse_when_busy(self) -> None:
        job = self._worker.changing
        if job is not None:
            raise Busy(
                f"{job.title} is changing the sim: wait for it (job.result()) or cancel it (job.cancel()) first."
            )

    def _refuse_inside(self, verb: str, advice: str) -> None:
        if self._worker.is_here:
            raise Busy(f"lab.{verb} was called from inside a job, which it would wait for. {advice}")

    def _announce(self, edited: tuple[str, ...]) -> None:
        """Tells everybody; the lock is free."""
        self._keep_script()
        self.events.send("edited", edited)
        self.events.send("history_changed")
        self.events.send("scores", self.known_scores)
        if self.live and self._state.missing and not self.sim.training:  # evaluating would end a training in progress
            self.measure()

    def _keep_script(self) -> None:
        if self._script_path is not None:
            beside = self._script_path.with_name(f".{self._script_path.name}.part")
            beside.write_text(script_of(self._beginning, self._state.history.actions), encoding="utf-8")
            beside.replace(self._script_path)

    def _announce_all(self) -> None:
        self._announce(self._state.rows.names)

    def _launch(self, task: Task) -> Job:
        if task.changes and self.live and self._measuring is not None:
            self._measuring.cancel()  # it would be in vain; the end of the job starts another
        return self._worker.start(Job(task.work, task.title, task.changes, self.events, task.then))


def _finish(job: Job) -> Any:
    """Waits for a job with a bar driven by the calling thread, where bars are seen."""
    with Bar(job.title) as bar:
        return job.result(progress=bar)


def _bound(value: float | Sequence[float] | Tensor) -> float | tuple[float, ...]:
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    return tuple(float(v) for v in value) if isinstance(value, Sequence) else float(value)
