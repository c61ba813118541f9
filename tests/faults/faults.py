"""Faults made on purpose: an interrupt at a random moment, a disk that takes no more."""

import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Lines:
    """A context that counts the lines of Python that run in it, and raises KeyboardInterrupt before one of them.

    That is where Python delivers a Ctrl-C: between two lines of anybody's code. Counted, a moment can be met again.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.count = 0
        self._stop_at = stop_at

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self._stop_at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> "Lines":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


@contextlib.contextmanager
def ctrl_c_after(seconds: float) -> Iterator[None]:
    """KeyboardInterrupt in the main thread once the process has computed for `seconds`, wherever it is then.

    Counted in processor time, so that a busy machine does not move the moment.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def full_disk(free_bytes: int = 100) -> Iterator[None]:
    """Within the context the system refuses to write more than `free_bytes` into any file.

    The limit is the kernel's own, so it holds for writers in C and Rust as well, and needs no rights.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
