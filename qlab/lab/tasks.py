"""What the jobs of a Lab do: run a technique, an analysis or a function as a step, and measure what is stale."""

import copy
import time
from collections.abc import Callable
from typing import Any

from qlab.lab.events import LabEvents
from qlab.lab.jobs import Job
from qlab.lab.journal import Action
from qlab.lab.scores import Scores, Superseded, score_rows
from qlab.lab.state import LabState
from qlab.progress import Progress
from qlab.sim import Measurement, QuantSim, Snapshot

SETTLE_S = 0.05  # a measurement begins when nothing was edited for so long


def changing(
    state: LabState, action: Action, work: Callable[[Job], Any], weights: bool, announce: Callable[[], None]
) -> Callable[[Job], Any]:
    """A job's work that changes the sim as one step; the job holds the lock. `work` restores the sim where it fails."""

    def run(job: Job) -> Any:
        began = time.perf_counter()
        try:
            state.notice()
            if weights:
                state.board.measure_float(job)
                state.board.replay.forget()  # its memory serves the technique better
            state.board.version += 1
            value = work(job)
            state.record(action, new_weights=weights, seconds=time.perf_counter() - began)
            return value
        except BaseException:
            state.watch.look()
            raise
        finally:
            job.outside(announce)

    return run


def function_work(state: LabState, function: Callable[[QuantSim, Progress], Any]) -> Callable[[Job], Any]:
    """A function of (sim, progress) as a transaction."""

    def work(job: Job) -> Any:
        snapshot = Snapshot(state.sim)
        try:
            return function(state.sim, job)
        except BaseException:
            snapshot.restore()
            raise

    return work


def analysis_work(state: LabState, measure: Callable[..., Any], batches: Any, score: Any) -> Callable[[Job], Any]:
    """An analysis of a copy of the sim as it is when the job begins, so that edits go on meanwhile."""

    def work(job: Job) -> Any:
        with state.lock:
            state.notice()
            twin = copy.deepcopy(state.sim)
        return measure(twin, batches, score=score, progress=job)

    return work


class Measuring:
    """The one measurement of a lab: it begins again when the sim is edited, and ends when nothing is stale.

    has_finished: set under the lock together with the last result; an edit after that needs another job.
    """

    def __init__(self, state: LabState, events: LabEvents) -> None:
        self._state = state
        self._events = events
        self._latest: dict[str, Measurement] = {}
        self.has_finished = False

    def __call__(self, job: Job) -> Scores:
        """The work of the job."""
        while True:
            try:
                self._once(job)
                return self.scores()
            except Superseded:
                job.wait(SETTLE_S)

    def scores(self) -> Scores:
        """What is known now; what belongs to an earlier state is marked stale."""
        return Scores(score_rows(self._state.board, self._state.history.current.scores, self._latest))

    def _once(self, job: Job) -> None:
        state, board = self._state, self._state.board
        with state.lock:
            version, missing, has_noise = board.version, state.missing, bool(state.history.current.noise)
        if "sqnr" in missing or "agreement" in missing:
            self._keep(version, board.measure_probe(job), {})
        if not has_noise:
            self._keep(version, {}, board.measure_noise(job))
        if "score" in missing:
            self._keep(version, {"score": board.measure_score(job)}, {})
        with state.lock:
            if board.version != version:
                raise Superseded
            self.has_finished = True

    def _keep(self, version: int, scores: dict[str, Measurement], noise: dict[str, float]) -> None:
        """Gives what was measured to the present step, if the sim is still what it was."""
        state = self._state
        with state.lock:
            if state.board.version != version:
                raise Superseded
            state.history.current.scores.update(scores)
            self._latest.update(scores)
            state.history.current.noise.update(noise)
        if noise:
            self._events.send("noise", tuple(noise))
        if scores:
            self._events.send("scores", self.scores())
            self._events.send("history_changed")
