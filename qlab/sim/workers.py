"""Work in pieces on the workers of an executor (concurrent.futures, or dask's client.get_executor()).

A piece does not depend on another, so one that a dying worker takes along is computed again here, from the same bytes:
the numbers are the same wherever a piece is computed.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, TimeoutError
from typing import Any

import torch

from qlab.sim.transport import from_bytes, to_bytes

Function = Callable[[Any, Any], Any]
"""(what all pieces share, the piece) to its result; defined at the top level of a module."""


class Workers:
    """Runs a function on pieces. shared: what every piece needs; each worker unpacks it once and must not change it.

    lost: how many pieces workers took along or failed at, and that were computed here; reason: why the last was.
    """

    def __init__(self, executor: Executor, shared: Any) -> None:
        self.lost = 0
        self.reason = ""
        self._executor = executor
        self._package = to_bytes((shared, torch.get_num_threads()))
        self._key = hashlib.sha256(self._package).hexdigest()

    def start(self, function: Function, piece: Any) -> "Started":
        """Sends a piece off."""
        data = to_bytes((function, piece))
        try:
            return Started(self, data, self._executor.submit(_work, self._key, self._package, data))
        except RuntimeError as error:  # the pool is broken or closed
            return Started(self, data, None, error)

    def map(self, function: Function, pieces: Iterable[Any], waiting: Callable[[], None]) -> Iterator[Any]:
        """The results in the order of the pieces, all of which are sent at once. waiting: as in `Started.result`."""
        started = [self.start(function, piece) for piece in pieces]
        try:
            for one in started:
                yield one.result(waiting)
        finally:
            for one in started:
                one.cancel()

    def here(self, data: bytes, error: Exception) -> Any:
        """Computes a piece in this process."""
        self.lost += 1
        self.reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        return from_bytes(_work(self._key, self._package, data))


class Started:
    """A piece on its way."""

    def __init__(
        self, workers: Workers, data: bytes, future: "Future[bytes] | None", error: Exception | None = None
    ) -> None:
        self._workers, self._data, self._future, self._error = workers, data, future, error

    def result(self, waiting: Callable[[], None] = lambda: None) -> Any:
        """What the function gave. waiting: called often meanwhile; may raise to stop.

        Raises what the function raises where it fails here as well.
        """
        if self._future is None:
            assert self._error is not None
            return self._workers.here(self._data, self._error)
        while True:
            waiting()
            try:
                return from_bytes(self._future.result(timeout=0.2))
            except TimeoutError as error:
                if self._future.done():
                    return self._workers.here(self._data, error)
            except Exception as error:  # noqa: BLE001  if the piece itself is at fault, that raises here
                return self._workers.here(self._data, error)

    def cancel(self) -> None:
        """Not needed any more."""
        if self._future is not None:
            self._future.cancel()


_known = threading.local()


def _work(key: str, package: bytes, data: bytes) -> bytes:
    """One piece, in a worker; what is shared is unpacked once."""
    if getattr(_known, "key", None) != key:
        shared, threads = from_bytes(package)
        torch.set_num_threads(threads)  # sums depend on how they are split
        _known.key, _known.shared = key, shared
    function, piece = from_bytes(data)
    return to_bytes(function(_known.shared, piece))
