"""Long work in a thread of its own: progress, cancel, pause, a result that can be waited for, one job at a time.

A job's `step` is its only meeting point with the outside: there it reports (at most ten times a second), pauses, stops
when cancelled, and lets others use the sim that it holds.
"""

import asyncio
import atexit
import enum
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from qlab.errors import Busy, Cancelled
from qlab.lab.events import LabEvents
from qlab.progress import Progress
from qlab.techniques import Report

REPORT_EVERY_S = 0.1
TURN_S = 0.1  # how long a job that holds the lock waits for somebody to take it


class JobState(enum.Enum):
    """Where a job is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (JobState.WAITING, JobState.RUNNING)


class EngineLock:
    """A re-entrant lock whose holder can let those who wait have a turn."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._count = threading.Lock()
        self._waiting = 0

    def __enter__(self) -> "EngineLock":
        if not self._lock.acquire(blocking=False):
            with self._count:
                self._waiting += 1
            try:
                self._lock.acquire()
            finally:
                with self._count:
                    self._waiting -= 1
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Within the context others may hold the lock; the caller holds it exactly once."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def give_turn(self) -> None:
        """Lets a waiting thread in before going on; the caller holds the lock exactly once."""
        waiting = self._waiting
        if waiting:
            with self.released():
                deadline = time.monotonic() + TURN_S
                while self._waiting >= waiting and time.monotonic() < deadline:
                    time.sleep(0.0002)  # a lock released and taken at once would be ours again


class Job:
    """Work that runs in a thread: a technique, an analysis, a measurement or a function.

    title: what the person reads. changes: whether it changes the sim; edits are refused meanwhile. state, done, total,
    text, seconds, rate and seconds_left say how far it is; value, exception and report what came of it.
    then: called when the end of work that had begun was announced, the lock free; nobody waits for it to see the end.
    A job is also the Progress that its work reports to.
    """

    def __init__(
        self,
        work: Callable[["Job"], Any],
        title: str,
        changes: bool,
        events: LabEvents,
        then: Callable[[], None] | None = None,
    ) -> None:
        self.title = title
        self.changes = changes
        self.state = JobState.WAITING
        self.done = 0
        self.total = 0
        self.text = ""
        self.value: Any = None
        self.exception: BaseException | None = None
        self._work = work
        self._then = then
        self._events = events
        self._stop = threading.Event()
        self._resumed = threading.Event()
        self._resumed.set()
        self._over = threading.Event()
        self._turning = threading.Lock()  # from waiting to running or cancelled, one of them
        self._began: float | None = None
        self._ended: float | None = None
        self._reported = 0.0
        self._lock: EngineLock | None = None
        self._thread: threading.Thread | None = None

    # What the person does ---------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Asks the work to stop at its next step; what it had changed is put back.

        A job that waits for its turn ends at once; after the end nothing happens.
        """
        self._stop.set()
        self._resumed.set()
        with self._turning:
            waited = self.state is JobState.WAITING
            if waited:
                self.exception = Cancelled(f"{self.title} was cancelled before it began.")
                self.state = JobState.CANCELLED
        if waited:
            self._end()

    def pause(self) -> None:
        """Holds the work at its next step; the sim stays as it is there and edits stay refused."""
        if not self.state.is_over:
            self._resumed.clear()

    def resume(self) -> None:
        """Lets paused work go on."""
        self._resumed.set()

    def result(self, timeout_s: float | None = None, progress: Progress | None = None) -> Any:
        """Waits and returns the value; raises the job's own exception, or Cancelled.

        An interrupt (Ctrl-C, Kernel > Interrupt) cancels the job, waits until the sim is restored, and is raised
        again. progress: told how far the job is, in the calling thread. Raises TimeoutError after `timeout_s` seconds;
        the job goes on.
        """
        if self._is_own_thread and not self.state.is_over:
            raise Busy(f"{self.title!r} waits for itself: result() was called from inside the job.")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not self._over.wait(0.05):  # short waits keep an interrupt deliverable
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{self.title!r} is still {self.state.value} after {timeout_s:g} s.")
                if progress is not None and self.total:
                    progress.step(self.done, self.total, self.text)
        except KeyboardInterrupt:
            self.cancel()
            while not self._over.wait(0.05):
                pass
            raise
        if progress is not None and self.total:
            progress.step(self.done, self.total, self.text)
        if self.exception is not None:
            raise self.exception
        return self.value

    def __await__(self) -> Generator[Any, None, Any]:
        async def wait() -> Any:
            try:
                while not self._over.is_set():
                    await asyncio.sleep(0.05)
            except (KeyboardInterrupt, asyncio.CancelledError):
                self.cancel()
                raise
            return self.result()

        return wait().__await__()

    # What it says -----------------------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        """Whether the work was asked to pause."""
        return not self._resumed.is_set()

    @property
    def is_cancelling(self) -> bool:
        """Whether the work was asked to stop and has not yet."""
        return self._stop.is_set() and not self.state.is_over

    @property
    def report(self) -> Report | None:
        """The report, where the work was a technique that finished."""
        return self.value if isinstance(self.value, Report) else None

    @property
    def seconds(self) -> float:
        """Seconds since it began to run; the whole run once it is over; 0 while it waits."""
        if self._began is None:
            return 0.0
        return (self._ended if self._ended is not None else time.monotonic()) - self._began

    @property
    def rate(self) -> float | None:
        """Steps a second, None before the first."""
        return self.done / self.seconds if self.done and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """An estimate of the seconds that remain, None where nothing is known."""
        rate = self.rate
        if self.state.is_over:
            return 0.0
        return None if rate is None or not self.total else max(self.total - self.done, 0) / rate

    def __repr__(self) -> str:
        progress = f", {self.done} of {self.total}" if self.total and not self.state.is_over else ""
        failed = f": {type(self.exception).__name__}: {self.exception}" if self.state is JobState.FAILED else ""
        return f"Job({self.title!r}, {self.state.value}{progress}{failed})"

    # What the work does -----------------------------------------------------------------------------------------------

    def step(self, done: int, total: int, text: str = "") -> None:
        """Reports, waits while paused, and raises Cancelled when asked to stop."""
        self.check()
        self.done, self.total, self.text = done, total, text
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY_S:
            self._reported = now
            self.outside(lambda: self._events.send("job_progress", self))
        if self.is_paused:
            self.outside(self._wait_until_resumed)
        if self._lock is not None and self._is_own_thread:
            self._lock.give_turn()
        self.check()

    def publish(self, record: object) -> None:
        """Hands an intermediate result to whoever listens."""
        self.outside(lambda: self._events.send("job_published", self, record))

    def check(self) -> None:
        """Raises Cancelled when asked to stop."""
        if self._stop.is_set():
            at = f" at step {self.done} of {self.total}" if self.total else ""
            raise Cancelled(f"{self.title} was cancelled{at}.")

    def wait(self, seconds: float) -> None:
        """Waits, unless asked to stop: then raises Cancelled."""
        self._stop.wait(seconds)
        self.check()

    def _wait_until_resumed(self) -> None:
        self._resumed.wait()

    @property
    def _is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def outside(self, action: Callable[[], None]) -> None:
        """Does something while others may use the sim."""
        if self._lock is None or not self._is_own_thread:  # work may report from threads of its own
            action()
            return
        with self._lock.released():
            action()

    def _run(self, lock: EngineLock) -> None:
        """Runs to the end, whatever happens; called by the worker."""
        with self._turning:
            if self.state.is_over:
                return
            self.state = JobState.RUNNING
        self._thread = threading.current_thread()
        self._began = time.monotonic()
        try:
            self._events.send("job_started", self)
            if self.changes:
                with lock:
                    self._lock = lock
                    try:
                        value = self._work(self)
                    finally:
                        self._lock = None
            else:
                value = self._work(self)
            self.value, state = value, JobState.DONE
        except Cancelled as error:
            self.exception, state = error, JobState.CANCELLED
        except BaseException as error:  # noqa: BLE001  whoever asks for the result is shown it
            self.exception, state = error, JobState.FAILED
        self._ended = time.monotonic()
        self.state = state
        self._end()

    def _end(self) -> None:
        self._work = _over  # what it closed over may be large
        then, self._then = self._then, None
        try:
            self._events.send("job_ended", self)
        finally:
            try:
                if then is not None and self._began is not None:
                    then()
            finally:
                self._over.set()


class Worker:
    """Runs one job at a time, in the order given, in a daemon thread that lives as long as there is work.

    lock: held by jobs that change what they work on.
    """

    def __init__(self) -> None:
        self.lock = EngineLock()
        self._queue: deque[Job] = deque()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self.current: Job | None = None
        _WORKERS.add(self)

    @property
    def changing(self) -> Job | None:
        """The job that is changing the sim just now."""
        job = self.current
        return job if job is not None and job.changes and not job.state.is_over else None

    @property
    def is_here(self) -> bool:
        """Whether the caller is the worker's own thread."""
        return threading.current_thread() is self._thread

    @property
    def jobs(self) -> list[Job]:
        """The job that runs and those that wait."""
        with self._guard:
            return ([self.current] if self.current is not None else []) + list(self._queue)

    def start(self, job: Job) -> Job:
        """Runs `job` as soon as those before it are over."""
        with self._guard:
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="qlab-job", daemon=True)
                self._thread.start()
        return job

    def cancel_all(self, timeout_s: float = 5.0) -> None:
        """Cancels every job and waits for the end of the one that runs."""
        with self._guard:
            thread = self._thread
            jobs = ([self.current] if self.current is not None else []) + list(self._queue)
        for job in jobs:
            job.cancel()
        if thread is not None and not self.is_here:
            thread.join(timeout_s)

    def _loop(self) -> None:
        while True:
            with self._guard:
                if not self._queue:
                    self._thread = None
                    return
                self.current = self._queue.popleft()
            try:
                self.current._run(self.lock)
            except Exception:  # noqa: BLE001  a strict callback's: shown as any thread's, and the next job runs
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
            finally:
                with self._guard:
                    self.current = None


def worker_of(owner: Any) -> Worker:
    """The one worker of `owner`, a sim, whatever the number of labs on it."""
    return _OWNED.setdefault(owner, Worker())


def _over(job: Job) -> Any:
    raise Busy(f"{job.title!r} is over; start it again.")


_WORKERS: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_OWNED: "weakref.WeakKeyDictionary[Any, Worker]" = weakref.WeakKeyDictionary()


@atexit.register
def _stop_workers() -> None:
    """A daemon thread inside torch while the interpreter goes down crashes it: cancel and wait."""
    for worker in list(_WORKERS):
        worker.cancel_all()
