"""What a Lab announces, as psygnal signals; a callback that fails is announced too and breaks nothing.

Signals are sent when the Lab is consistent again and its lock is free, in the thread where the change happened: the
caller's for edits, the job's for jobs and measurements.
"""

import os
from collections.abc import Callable
from typing import Any

from psygnal import EmitLoopError, Signal, SignalInstance


class GuardedSignal(SignalInstance):
    """A signal whose callbacks cannot stop each other: an exception goes to `LabEvents.error` instead.

    With QLAB_STRICT=1 it is raised as well, as the tests want it.
    """

    def connect(self, slot: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Call `slot` with the values of every emission; usable as a decorator."""
        if slot is None:
            return lambda later: self.connect(later, **options)
        guards = self.instance.guards.setdefault(self.name, {})
        if slot not in guards:
            guards[slot] = _guard(slot, self.instance, is_error=self.name == "error")
            super().connect(guards[slot], **options)
        return slot

    def disconnect(self, slot: Callable[..., Any] | None = None, missing_ok: bool = True) -> None:
        """Stop calling `slot`, or everything."""
        guards = self.instance.guards.setdefault(self.name, {})
        if slot is None:
            guards.clear()
            super().disconnect(None, missing_ok)
        else:
            super().disconnect(guards.pop(slot, slot), missing_ok)


def _signal(*types: type) -> Signal:
    return Signal(*types, signal_instance_class=GuardedSignal)


class LabEvents:
    """The signals of one Lab; `lab.events.edited.connect(callback)`.

    edited(names: tuple[str, ...])    rows of these layers changed: by a verb, undo, redo, or in a cell
    selected(names: tuple[str, ...])  the selection changed
    scores(scores: Scores)            scores were measured, or became stale
    noise(names: tuple[str, ...])     the measured noise of these layers changed
    job_started(job: Job)             a job began to run
    job_progress(job: Job)            it moved; at most ten times a second
    job_published(job: Job, record)   its work gave an intermediate result, such as a TrainingStep
    job_ended(job: Job)               it ended, see job.state
    history_changed()                 a step was added, undone, redone, or got its scores
    error(exception: BaseException)   a callback of one of these signals failed
    """

    edited = _signal(tuple)
    selected = _signal(tuple)
    scores = _signal(object)
    noise = _signal(tuple)
    job_started = _signal(object)
    job_progress = _signal(object)
    job_published = _signal(object, object)
    job_ended = _signal(object)
    history_changed = _signal()
    error = _signal(object)

    def __init__(self) -> None:
        self.guards: dict[str, dict[Callable[..., Any], Callable[..., Any]]] = {}

    def send(self, name: str, *values: Any) -> None:
        """Emits the signal `name`; raises a callback's own exception when strict."""
        try:
            getattr(self, name).emit(*values)
        except EmitLoopError as error:
            raise (error.__cause__ or error) from None


def is_strict() -> bool:
    """Whether errors of callbacks are raised as well as announced: QLAB_STRICT=1."""
    return os.environ.get("QLAB_STRICT") == "1"


def _guard(slot: Callable[..., Any], events: LabEvents, is_error: bool) -> Callable[..., Any]:
    def call(*values: Any) -> None:
        try:
            slot(*values)
        except Exception as error:  # announced, so that whoever shows errors shows it
            if not is_error:
                events.send("error", error)
            if is_strict():
                raise

    return call
