"""What the pane and the grid share: heavy state that travels as patches, with a snapshot for who comes later.

A browser that opens the widget first gets a snapshot, then patches. A reload asks the kernel again and gets a
fresh one. Saved notebooks and nbconvert read the last snapshot sent, so it is sent again after each cell and once
things have been quiet for a second.
"""

import time
import weakref
from typing import Any

import anywidget
import traitlets
from IPython import get_ipython

from qlab.views.in_order import InOrder
from qlab.views.view import with_fallback

QUIET_S = 1.0
PATIENCE_S = 1.0

_open_widgets: "weakref.WeakSet[LiveWidget]" = weakref.WeakSet()
_watched_shells: "weakref.WeakSet[Any]" = weakref.WeakSet()


class LiveWidget(anywidget.AnyWidget):
    """An anywidget whose `_snapshot` is taken from the live state whenever somebody asks for it.

    Subclasses override `take_snapshot`, `receive`, `summary` and `to_html`, call `changed` when the live state has
    changed, and must be ready for `take_snapshot` before `LiveWidget.__init__` runs. Views in the browser ignore
    changes of `_snapshot`: patches have brought them there already.
    """

    alert = traitlets.Unicode(help="a sentence shown at the widget until it is emptied").tag(sync=True)
    _snapshot = traitlets.Any().tag(sync=True, to_json=lambda _, widget: widget.take_snapshot())

    def __init__(self, **traits: Any) -> None:
        self._order = InOrder()
        self._is_stale = False
        self._changed_at = 0.0
        self._is_waiting = False
        super().__init__(**traits)
        self.on_msg(self._receive_in_order)
        _open_widgets.add(self)
        _refresh_after_cells()

    def take_snapshot(self) -> Any:
        """The whole live state as JSON."""
        raise NotImplementedError

    def receive(self, message: dict[str, Any]) -> None:
        """Handle a message from the browser."""
        raise NotImplementedError

    def summary(self) -> str:
        """text/plain: one line, the same on every run."""
        raise NotImplementedError

    def to_html(self) -> str:
        """What a reader without a kernel sees; no scripts, all escaped."""
        raise NotImplementedError

    def changed(self) -> None:
        """Note that the snapshot in the browser is stale; any thread may call this."""
        self._is_stale = True
        self._changed_at = time.monotonic()
        self._refresh_later()

    def refresh(self) -> None:
        """Send a fresh snapshot if the last one is stale."""
        if not self._is_stale or self.comm is None:
            return
        self._is_stale = False
        try:
            self.send_state("_snapshot")
        except RuntimeError:  # another thread changed the state while it was read
            self.changed()

    def close(self) -> None:
        _open_widgets.discard(self)
        super().close()

    def _refresh_later(self) -> None:
        if not self._is_waiting and (loop := _kernel_loop()) is not None:
            self._is_waiting = True
            loop.add_callback(loop.call_later, QUIET_S, self._refresh_when_quiet)

    def _refresh_when_quiet(self) -> None:
        self._is_waiting = False
        if time.monotonic() - self._changed_at < 0.9 * QUIET_S:
            self._refresh_later()
        else:
            self.refresh()

    def _receive_in_order(self, _widget: Any, message: dict[str, Any], _buffers: list[memoryview]) -> None:
        browser, number = message.pop("turn")
        self._receive_all(self._order.arrived(browser, number, message))
        if self._order.is_waiting and (loop := _kernel_loop()) is not None:
            loop.add_callback(loop.call_later, PATIENCE_S, lambda: self._receive_all(self._order.give_up()))

    def _receive_all(self, messages: list[dict[str, Any]]) -> None:
        for i, message in enumerate(messages):
            try:
                self.receive(message)
            except Exception as error:
                self.alert = f"{type(error).__name__}: {error}"
                self._receive_all(messages[i + 1 :])
                raise  # the kernel's log shows the traceback

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_fallback(super()._repr_mimebundle_(**kwargs), self.summary(), self.to_html())


def _kernel_loop() -> Any:
    kernel = getattr(get_ipython(), "kernel", None)
    return getattr(kernel, "io_loop", None)


def _refresh_after_cells() -> None:
    shell = get_ipython()
    if shell is not None and shell not in _watched_shells:
        _watched_shells.add(shell)
        shell.events.register("post_run_cell", lambda _result: _refresh_all())


def _refresh_all() -> None:
    for widget in list(_open_widgets):
        widget.refresh()
