"""Stages of AutoQuant as values: what was tried, what came of it, and how a person steers while it runs."""

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

VALIDATE, FLOAT, GIVEN, WEIGHTS = "validate", "float", "as given", "weights in float"
"""The stages that every search begins with."""

COLUMNS = ("stage", "parent", "technique", "score", "low", "high", "gain", "sqnr", "seconds", "verdict", "reason")


class Steering:
    """A person's word in a running AutoQuant: names of stages, or of techniques, to leave out or to keep.

    Both methods may be called from any thread, before a stage starts, while it runs and after it. A veto ends a running
    stage and takes it, and what was built on it, out of the choice. A forced stage is kept whatever its score: stages
    after it build on it, and it is part of the result.
    """

    def __init__(self, veto: Iterable[str] = (), force: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._vetoed, self._forced = set(veto), set(force)

    def add(self, veto: Iterable[str], force: Iterable[str]) -> None:
        """Leave out and keep all of these."""
        with self._lock:
            self._vetoed.update(veto)
            self._forced.update(force)

    def veto(self, stage: str) -> None:
        """Leave the stage out; takes back an earlier `force`."""
        with self._lock:
            self._forced.discard(stage)
            self._vetoed.add(stage)

    def force(self, stage: str) -> None:
        """Keep the stage whatever its score; takes back an earlier `veto`."""
        with self._lock:
            self._vetoed.discard(stage)
            self._forced.add(stage)

    def is_vetoed(self, *names: str) -> bool:
        """Whether one of a stage's names was vetoed."""
        with self._lock:
            return not self._vetoed.isdisjoint(names)

    def is_forced(self, *names: str) -> bool:
        """Whether one of a stage's names was forced."""
        with self._lock:
            return not self._forced.isdisjoint(names)

    @property
    def vetoed(self) -> frozenset[str]:
        """The names to leave out."""
        with self._lock:
            return frozenset(self._vetoed)

    @property
    def forced(self) -> frozenset[str]:
        """The names to keep."""
        with self._lock:
            return frozenset(self._forced)

    def __repr__(self) -> str:
        with self._lock:
            return f"Steering(veto={sorted(self._vetoed)}, force={sorted(self._forced)})"


@dataclass(frozen=True)
class StageRecord:
    """One stage: what was tried on which earlier stage, and what came of it. Published when it starts and ends.

    stage: unique. parent: the stage it starts from, None for the first. technique: its class, '' for ranges and checks.
    score, low, high: with the 95 % interval, NaN where unknown. gain: against the parent. sqnr [dB]: of the result
    against the original float model, NaN where the score gives no outputs. verdict: 'reference' (not a candidate),
    'running', 'target met', 'effective', 'discarded', 'failed', 'vetoed' or 'forced'. reason: why. steering: for a
    view's buttons.
    """

    stage: str
    parent: str | None
    technique: str = ""
    score: float = math.nan
    low: float = math.nan
    high: float = math.nan
    gain: float = math.nan
    sqnr: float = math.nan
    seconds: float = 0.0
    verdict: str = "running"
    reason: str = ""
    steering: Steering | None = field(default=None, repr=False, compare=False)

    def numbers(self) -> dict[str, object]:
        """The record as a row."""
        return {name: value for name, value in vars(self).items() if name != "steering"}


def stage_table(records: Iterable[StageRecord], lineage: Iterable[str] = ()) -> "pd.DataFrame":
    """One row a stage, in order; `is_best` marks those that lead to the result (`lineage`)."""
    import pandas as pd

    frame = pd.DataFrame([{name: getattr(r, name) for name in COLUMNS} for r in records], columns=list(COLUMNS))
    frame["parent"] = frame["parent"].astype(object).where(frame["parent"].notna(), None)
    return frame.assign(is_best=frame["stage"].isin(set(lineage)))
