"""What a running AutoQuant tells: a record of each stage, how far it is, and where it is to end.

A stop is an exception that the progress of a stage raises from inside of whatever the stage is doing.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

from qlab.errors import Cancelled
from qlab.progress import Progress, publish
from qlab.sim import Measurement
from qlab.techniques.stages import StageRecord, Steering

ENDED = ("out of time", "cancelled")
"""Reasons of stages that something ended before they were done."""


class Vetoed(Cancelled):
    """The running stage was vetoed."""


class OutOfTime(Cancelled):
    """The time budget is spent."""


class Finished(Exception):
    """Nothing more needs to be tried."""


class NothingToDo(Exception):
    """A technique found nothing to change."""


class BrokenProgress(BaseException):
    """The progress raised: no stage's fault, so that none may take it for its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class StageLog:
    """The records of a run in order, told as they change. total: about how many there will be, for the progress bar.

    has_candidate: whether there is something to return already, without which the time budget does not count.
    """

    def __init__(
        self, progress: Progress, steering: Steering, budget_s: float | None, has_candidate: Callable[[], bool]
    ) -> None:
        self.progress, self.steering = progress, steering
        self.records: list[StageRecord] = []
        self.notes: list[str] = []
        self.total, self.reached = 1, 0
        self.started = time.perf_counter()
        self._budget_s, self._has_candidate = budget_s, has_candidate

    def scored(
        self, record: StageRecord, score: Measurement, sqnr: float, started: float, verdict: str, reason: str
    ) -> StageRecord:
        """The record with its numbers and its verdict; it is not kept yet."""
        low, high = score.interval or (math.nan, math.nan)
        above = next((known.score for known in self.records if known.stage == record.parent), math.nan)
        return replace(
            record,
            score=float(score),
            low=low,
            high=high,
            gain=float(score) - above,
            sqnr=sqnr,
            seconds=time.perf_counter() - started,
            verdict=verdict,
            reason=reason,
        )

    def record(self, record: StageRecord) -> StageRecord:
        """Keeps a record, in place of an earlier one of the same stage, and tells of it."""
        names = [known.stage for known in self.records]
        if record.stage in names:
            self.records[names.index(record.stage)] = record
        else:
            self.records.append(record)
        self.tell(record)
        return record

    def tell(self, record: StageRecord) -> None:
        """Publishes a record, with what a view needs for its buttons."""
        publish(self.progress, replace(record, steering=self.steering))

    def require_time(self, name: str) -> None:
        """Raises OutOfTime where the budget is spent; a first candidate is always found."""
        if self._budget_s is None or not self._has_candidate():
            return
        if time.perf_counter() - self.started >= self._budget_s:
            raise OutOfTime(name)

    def finished(self) -> int:
        """How many stages count as run: a veto is as good as not having begun."""
        return sum(record.verdict != "vetoed" and record.reason not in ENDED for record in self.records)

    def progress_of(self, *names: str) -> "StageProgress":
        """The progress of a stage, given all that it may be called."""
        return StageProgress(self, names)


class StageProgress:
    """The progress of one stage as a part of the whole; ends the stage when it is vetoed or the time is up."""

    def __init__(self, log: StageLog, names: tuple[str, ...]) -> None:
        self._log, self._names = log, names

    def step(self, done: int, total: int, text: str = "") -> None:
        """Report; raise where the stage, or everything, is to end."""
        log, name = self._log, self._names[0]
        if log.steering.is_vetoed(*self._names):
            raise Vetoed(name)
        log.require_time(name)
        reached = min(len(log.records) + (min(done / total, 1.0) if total else 0.0), log.total)
        log.reached = max(log.reached, round(100 * reached))  # a stage has several parts that each begin at 0
        try:
            log.progress.step(log.reached, 100 * log.total, f"{name}: {text}" if text else name)
        except Cancelled:
            raise
        except Exception as error:
            raise BrokenProgress(error) from error

    def publish(self, record: object) -> None:
        """Pass an intermediate result on."""
        publish(self._log.progress, record)
