"""The background measurement of a lab: it begins again when the sim is edited, and ends when nothing is stale."""

from qlab.lab.events import LabEvents
from qlab.lab.jobs import Job
from qlab.lab.scores import Scores, Superseded, score_rows
from qlab.lab.state import LabState
from qlab.sim import Measurement

SETTLE_S = 0.05  # it begins again when nothing was edited for so long


class Measuring:
    """The work of the one job that measures.

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
