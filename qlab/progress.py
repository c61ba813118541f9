"""How long work reports itself and how it is cancelled: one small protocol, known by every layer of qlab."""

import os
import threading
from typing import Any, Protocol

from qlab.errors import Cancelled


class Progress(Protocol):
    """Something that long work reports to; `step` is also the point where the work may be cancelled."""

    def step(self, done: int, total: int, text: str = "") -> None:
        """Report that `done` of `total` steps are finished; raise Cancelled when the work should stop."""


def publish(progress: Progress, record: object) -> None:
    """Hands `record`, an intermediate result, to a progress that can show it; others never notice."""
    show = getattr(progress, "publish", None)
    if show is not None:
        show(record)


class Silent:
    """A progress that reports nothing and never cancels."""

    def step(self, done: int, total: int, text: str = "") -> None:
        """Do nothing."""


class Cancellable:
    """A progress that another thread can cancel, and that passes each report on to `inner`."""

    def __init__(self, inner: Progress | None = None) -> None:
        self.inner: Progress = inner or Silent()
        self._stop = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop at its next step."""
        self._stop.set()

    @property
    def cancelled(self) -> bool:
        """Whether the work was asked to stop."""
        return self._stop.is_set()

    def step(self, done: int, total: int, text: str = "") -> None:
        """Report, or raise Cancelled when asked to stop."""
        if self._stop.is_set():
            raise Cancelled(f"cancelled at step {done} of {total}" + (f" ({text})" if text else ""))
        self.inner.step(done, total, text)

    def publish(self, record: object) -> None:
        """Pass an intermediate result on."""
        publish(self.inner, record)


class Bar:
    """A tqdm bar (a widget in Jupyter, a line in a terminal) as a progress; a context manager that closes it.

    Work that takes less than half a second shows none; QLAB_BARS=0 in the environment shows none at all, as for
    notebooks whose outputs are kept.
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self._bar: Any = None

    def step(self, done: int, total: int, text: str = "") -> None:
        """Move the bar to `done` of `total`."""
        from tqdm.auto import tqdm  # a slow import, needed only when a bar is shown

        if self._bar is None:
            is_off = os.environ.get("QLAB_BARS") == "0"
            self._bar = tqdm(total=total, desc=self.title, leave=False, delay=0.5, disable=is_off)
        self._bar.total = total
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
