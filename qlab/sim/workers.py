"""Work in pieces on the workers of an executor (concurrent.futures, or dask's client.get_executor()).

A piece does not depend on another, so one that a dying worker takes along is computed again here, from the same bytes:
the numbers are the same wherever a piece is computed. What all pieces share travels with the first few; a worker that
lacks it says so, and gets it with the piece sent again.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, TimeoutError, wait
from typing import Any

import torch

from qlab.errors import Cancelled
from qlab.sim.transport import from_bytes, to_bytes

Function = Callable[[Any, Any], Any]
"""(what all pieces share, the piece) to its result; defined at the top level of a module."""

IN_FLIGHT = 16
"""Pieces on their way at once where results are taken as they arrive: their data is in memory."""


class Workers:
    """Runs a function on pieces. shared: what every piece needs; each worker unpacks it once and only uses it.

    lost: how many pieces workers took along or failed at, and that were computed here; reason: why the last was.
    packages: how often what is shared was sent.
    """

    def __init__(self, executor: Executor, shared: Any) -> None:
        self.lost = 0
        self.reason = ""
        self.packages = 0
        self._executor = executor
        self._package = to_bytes((shared, torch.get_num_threads()))
        self._key = hashlib.sha256(self._package).hexdigest()

    def start(self, function: Function, piece: Any) -> "Started":
        """Sends a piece off; the first ones, one for each core, with what is shared."""
        return Started(self, to_bytes((function, piece)), self.packages < (os.cpu_count() or 1))

    def map(self, function: Function, pieces: Iterable[Any], waiting: Callable[[], None]) -> Iterator[Any]:
        """The results in the order of the pieces, all of which are sent at once. waiting: as in `Started.result`."""
        started = [self.start(function, piece) for piece in pieces]
        try:
            for one in started:
                yield one.result(waiting)
        finally:
            for one in started:
                one.cancel()

    def as_they_arrive(
        self, function: Function, pieces: Iterable[Any], waiting: Callable[[], None]
    ) -> Generator[Any, None, None]:
        """The results in the order in which they arrive, IN_FLIGHT pieces at most being on their way."""
        pending: list[Started] = []
        try:
            for piece in pieces:
                pending.append(self.start(function, piece))
                while len(pending) >= IN_FLIGHT or (pending and pending[-1].future is None):
                    yield from self._arrived(pending, waiting)
            while pending:
                yield from self._arrived(pending, waiting)
        finally:
            for one in pending:
                one.cancel()

    def submit(self, data: bytes, is_whole: bool) -> "Future[bytes | None]":
        """Sends the bytes of a piece, and where it is to be whole what is shared; raises RuntimeError where the pool is
        broken or closed."""
        future = self._executor.submit(_work, self._key, self._package if is_whole else None, data)
        self.packages += is_whole
        return future

    def here(self, data: bytes, error: BaseException) -> Any:
        """Computes a piece in this process."""
        self.lost += 1
        self.reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        found = _work(self._key, self._package, data)
        assert found is not None
        return from_bytes(found)

    def _arrived(self, pending: "list[Started]", waiting: Callable[[], None]) -> Iterator[Any]:
        """Changes `pending`: takes out what is there, after a moment at most."""
        futures = [one.future for one in pending if one.future is not None]
        if len(futures) == len(pending):
            wait(futures, timeout=_MOMENT_S, return_when=FIRST_COMPLETED)
        waiting()
        for one in list(pending):
            if (found := one.settled()) is not None:
                pending.remove(one)
                yield found[0]


class Started:
    """A piece on its way. future: None where it could not be sent off, and is to be computed here."""

    def __init__(self, workers: Workers, data: bytes, is_whole: bool) -> None:
        self._workers, self._data = workers, data
        self.future: Future[bytes | None] | None = None
        self._error: BaseException | None = None
        self._send(is_whole)

    def result(self, waiting: Callable[[], None] = lambda: None) -> Any:
        """What the function gave. waiting: called often meanwhile; may raise to stop.

        Raises what the function raises where it fails here as well.
        """
        while True:
            waiting()
            if (found := self.settled(_MOMENT_S)) is not None:
                return found[0]

    def settled(self, timeout_s: float = 0.0) -> tuple[Any] | None:
        """What the function gave, None where it is not there yet."""
        if self.future is None:
            assert self._error is not None
            return (self._workers.here(self._data, self._error),)
        try:
            found = self.future.result(timeout=timeout_s)
        except Cancelled:
            raise
        except TimeoutError as error:
            return (self._workers.here(self._data, error),) if self.future.done() else None
        except Exception as error:  # noqa: BLE001  if the piece itself is at fault, that raises here
            return (self._workers.here(self._data, error),)
        if found is not None:
            return (from_bytes(found),)
        self._send(is_whole=True)  # to a worker that is new, or was not among the first
        return None

    def cancel(self) -> None:
        """Not needed any more."""
        if self.future is not None:
            self.future.cancel()

    def _send(self, is_whole: bool) -> None:
        try:
            self.future = self._workers.submit(self._data, is_whole)
        except RuntimeError as error:  # the pool is broken or closed
            self.future, self._error = None, error


_MOMENT_S = 0.2  # how long to wait before asking whether to go on
_known = threading.local()


def _work(key: str, package: bytes | None, data: bytes) -> bytes | None:
    """One piece, in a worker; None where it lacks what is shared, which is unpacked once."""
    if getattr(_known, "key", None) != key:
        if package is None:
            return None
        shared, threads = from_bytes(package)
        torch.set_num_threads(threads)  # sums depend on how they are split
        _known.key, _known.shared = key, shared
    function, piece = from_bytes(data)
    return to_bytes(function(_known.shared, piece))
