"""AutoQuant's branches on workers: stages that start from the same state are computed before their turn comes.

What a stage is worth does not depend on where it is computed, so the search reads, judges and stops in its own order as
without workers; a stage that it never comes to is computed in vain.
"""

import tempfile
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlab.progress import Progress, Silent
from qlab.sim import Measurement, QuantSim
from qlab.sim.batches import Batches
from qlab.sim.workers import Started, Workers
from qlab.techniques.stage_scores import Scores
from qlab.techniques.stage_tree import set_rules
from qlab.techniques.technique import Technique


@dataclass(frozen=True)
class Ahead:
    """What a worker found: the technique's summary, score and SQNR, and the sim's state as a file's bytes."""

    note: str
    score: Measurement
    sqnr: float
    state: bytes | None


class StagesAhead:
    """Stages on their way, by key; without an executor there are none."""

    def __init__(self, executor: Executor | None) -> None:
        self._executor = executor
        self._workers: Workers | None = None
        self._started: dict[str, Started] = {}

    @property
    def is_on(self) -> bool:
        """Whether there are workers."""
        return self._executor is not None

    @property
    def lost(self) -> str:
        """What to tell of pieces that workers failed at, '' for none."""
        workers = self._workers
        if workers is None or not workers.lost:
            return ""
        return f"{workers.lost} stages were lost by workers and computed again here ({workers.reason})."

    def share(self, scores: Scores, data: Batches) -> None:
        """Gives the workers the score, which has seen the float model, and the data."""
        if self._executor is not None:
            self._workers = Workers(self._executor, (scores, list(data)))

    def send(self, key: str, sim: QuantSim, what: "tuple[str, str] | Technique") -> None:
        """Sends a stage off: `sim` in the state that it starts from, and rules or a technique."""
        if self._workers is not None and key not in self._started:
            self._started[key] = self._workers.start(_stage, (sim, what))

    def take(self, key: str, progress: Progress) -> Ahead | None:
        """What was found of a stage, None where it was not sent off. Raises what the stage raises."""
        started = self._started.pop(key, None)
        return None if started is None else started.result(lambda: progress.step(0, 1))

    def close(self) -> None:
        """Nothing more is needed."""
        for started in self._started.values():
            started.cancel()
        self._started.clear()


def _stage(shared: tuple[Scores, list[Any]], piece: "tuple[QuantSim, tuple[str, str] | Technique]") -> Ahead:
    """One stage, in a worker; the sim is the worker's own."""
    (scores, data), (sim, what) = shared, piece
    note, state = "", None
    if isinstance(what, Technique):
        note = what.apply(sim, data, score=scores.evaluation if what.needs_score else None).summary
        with tempfile.TemporaryDirectory(prefix="qlab-") as folder:
            path = Path(folder) / "sim.safetensors"
            sim.save(path)
            state = path.read_bytes()
    else:
        set_rules(sim, *what)
    score, sqnr = scores.of(sim, Silent())
    return Ahead(note, score, sqnr, state)
