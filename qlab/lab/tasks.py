"""What the jobs of a Lab do: run a technique, an analysis or a function; a change is one step, whole or not at all."""

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlab.errors import InputError
from qlab.lab.given import Given
from qlab.lab.jobs import Job
from qlab.lab.journal import Action, Apply, Calibrate, Foreign
from qlab.lab.state import LabState
from qlab.progress import Progress
from qlab.sim import Batches, QuantSim, Snapshot
from qlab.sim.files import load_state
from qlab.techniques import Report, Technique


@dataclass(frozen=True)
class Task:
    """What a job is to do. changes: it changes the sim, as one step of the history, and holds the lock meanwhile.

    then: called after its end, whatever that was.
    """

    title: str
    work: Callable[[Job], Any]
    changes: bool
    then: Callable[[], None] | None = None


def task_of(state: LabState, given: Given, what: Any, batches: Any, score: Any, announce: Callable[[], None]) -> Task:
    """The task for a technique, an analysis or a function of (sim, progress); raises InputError for anything else.

    batches, score: in place of those of the lab. announce: called, with the lock free, when a change is over.
    """
    data = given.batches if batches is None else Batches(batches)
    judge = given.score if score is None else score
    title = getattr(what, "__name__", type(what).__name__)
    if isinstance(what, Technique):
        action = Apply(what, given.named(data), None if judge is None else given.named(judge))
        return Task(title, _changing(state, action, _technique(state.sim, what, data, judge)), True, announce)
    if hasattr(what, "measure"):
        return Task(title, _analysis(state, what.measure, data, judge), False)
    if callable(what):
        action_ = Foreign(f"function {title}")
        return Task(title, _changing(state, action_, _function(state.sim, what)), True, announce)
    raise InputError(f"expected a technique, an analysis or a function of (sim, progress); got {what!r}.")


def calibration(state: LabState, given: Given, batches: Any, announce: Callable[[], None]) -> Task:
    """The task of measuring all ranges again, on `batches` or those of the lab."""
    data = given.batches if batches is None else Batches(batches)

    def work(job: Job) -> None:
        state.sim.calibrate(data, progress=job)

    return Task("calibrate", _changing(state, Calibrate(given.named(data)), work, weights=False), True, announce)


def _changing(
    state: LabState,
    action: Action,
    work: Callable[[Job], Any],
    weights: bool = True,
) -> Callable[[Job], Any]:
    """Work as one step; `work` leaves the sim as it was where it fails.

    Where the result holds a sim of its own, the lab goes on with that.
    """

    def run(job: Job) -> Any:
        began = time.perf_counter()
        try:
            state.notice()
            if weights:
                state.board.measure_float(job)
                state.board.replay.forget()  # its memory serves the technique better
            state.board.version += 1
            value, done = work(job), action
            found = getattr(value, "sim", None)
            if isinstance(done, Apply) and isinstance(value, Report) and value.as_done is not None:
                done = replace(done, technique=value.as_done)
            if isinstance(done, Apply) and isinstance(found, QuantSim) and found is not state.sim:
                _adopt(state.sim, found)
                done = replace(done, gives_sim=True)
            state.record(done, new_weights=weights, seconds=time.perf_counter() - began)
            return value
        except BaseException:
            state.watch.look()
            raise

    return run


def _technique(sim: QuantSim, technique: Technique, data: Batches, score: Any) -> Callable[[Job], Any]:
    def work(job: Job) -> Any:
        return technique.apply(sim, data, score=score, progress=job)

    return work


def _function(sim: QuantSim, function: Callable[[QuantSim, Progress], Any]) -> Callable[[Job], Any]:
    def work(job: Job) -> Any:
        snapshot = Snapshot(sim)
        try:
            return function(sim, job)
        except BaseException:
            snapshot.restore()
            raise

    return work


def _analysis(state: LabState, measure: Callable[..., Any], data: Batches, score: Any) -> Callable[[Job], Any]:
    """An analysis of a copy of the sim as it is when the job begins, so that edits go on meanwhile.

    Where it can tell rows as they are found, the job publishes them.
    """
    tells = "on_row" in inspect.signature(measure).parameters

    def work(job: Job) -> Any:
        with state.lock:
            state.notice()
            twin = copy.deepcopy(state.sim)
        options = {"on_row": job.publish} if tells else {}
        return measure(twin, data, score=score, progress=job, **options)

    return work


def _adopt(sim: QuantSim, found: QuantSim) -> None:
    """Changes `sim` to the state of a copy of it that went further."""
    snapshot = Snapshot(sim)
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "found.safetensors"
            found.save(path)
            load_state(sim, path)
    except BaseException:
        snapshot.restore()
        raise
    sim.log[:] = found.log
