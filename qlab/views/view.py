"""The base of every view: it holds a subject, follows the subject's events, and never loses an error.

A view is an ordinary ipywidgets box. What it adds: callbacks whose exceptions are shown in the view, event
subscriptions that end when it closes, and a static picture for whoever reads the notebook without running it.
"""

import functools
import html
import os
import threading
from collections.abc import Callable
from typing import Any

import ipywidgets
from IPython import get_ipython
from psygnal import SignalInstance

from qlab.views.frame import Frame

STATIC_NOTE = "<p><em>A still picture of a live view: run the cell to use it.</em></p>"


def is_strict() -> bool:
    """Whether errors in callbacks are raised as well as shown: QLAB_STRICT=1, as the tests set it."""
    return os.environ.get("QLAB_STRICT") == "1"


def escape(value: object) -> str:
    """Make any value safe as HTML text or attribute.

    >>> escape("<img src=x onerror='alert(1)'>")
    '&lt;img src=x onerror=&#x27;alert(1)&#x27;&gt;'
    """
    return html.escape(str(value), quote=True)


def with_fallback(bundle: Any, plain: str, static_html: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Complete a widget's mime bundle by what is shown where no kernel runs.

    plain: one line, the same on every run, since notebooks are tested by comparing it.
    static_html: everything in it that came from a model or a person must be escaped.
    """
    data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
    return {**data, "text/plain": plain, "text/html": static_html}, metadata


def guarded(callback: Callable[..., Any], frame: Frame) -> Callable[..., Any]:
    """Wrap a callback so that its exception is shown in the frame; when strict it is raised as well.

    The next call of the same callback that succeeds clears it; other callbacks leave it alone.
    """
    failed = False

    @functools.wraps(callback)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        try:
            result = callback(*args, **kwargs)
        except Exception as error:  # a view shows it to the person
            failed = True
            frame.show(error)
            if is_strict():
                raise
            return None
        if failed:
            failed = False
            frame.clear()
        return result

    return call


class View(ipywidgets.VBox):
    """A widget on a subject (a Lab): build the content, `display` it, and `listen` to the subject's events.

    Subclasses override `summary` (text/plain), `to_html` (the still picture) and, where they draw anew on events,
    `redraw`. `is_shown`: a view behind another tab is told False; what it misses it draws when it is shown again.
    `close` ends the subscriptions and closes everything displayed; it may be called twice.
    """

    def __init__(self, subject: Any) -> None:
        self.subject = subject
        self.frame = Frame(_words(type(self).__name__))
        self.frame.on_key = self.guarded(self.key_pressed)
        self._endings: list[Callable[[], object]] = []
        self._is_shown = True
        self._is_stale = False
        self._drawing = threading.Lock()
        super().__init__(children=[self.frame])
        self.add_class("qlab-view")

    def display(self, *widgets: ipywidgets.Widget) -> None:
        """Replace the content; the frame stays beneath it."""
        self.children = [*widgets, self.frame]

    def guarded(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a callback so that its errors are shown in this view."""
        return guarded(callback, self.frame)

    def listen(self, signal: SignalInstance, callback: Callable[..., Any]) -> None:
        """Call back, guarded, on every emission until this view closes."""
        call = self.guarded(callback)
        signal.connect(call)

        def end() -> None:
            if signal.instance is not None:
                signal.disconnect(call, missing_ok=True)

        self._endings.append(end)

    def redraw_on(self, *signals: SignalInstance) -> None:
        """Call `redraw` after every emission, once the view is shown."""
        for signal in signals:
            self.listen(signal, lambda *_: self.redraw_soon())

    def after_cells(self, callback: Callable[[], object]) -> None:
        """Call back, guarded, whenever a cell has run, until this view closes."""
        shell = get_ipython()
        if shell is None:
            return
        call = self.guarded(lambda _result: callback())
        shell.events.register("post_run_cell", call)
        self._endings.append(lambda: shell.events.unregister("post_run_cell", call))

    def redraw(self) -> None:
        """Show the subject as it is now."""

    def redraw_soon(self) -> None:
        """Call `redraw`, but one thread at a time, and only while the view is shown."""
        self._is_stale = True
        while self._is_shown and self._is_stale and self._drawing.acquire(blocking=False):
            try:
                self._is_stale = False
                self.redraw()
            finally:
                self._drawing.release()

    @property
    def is_shown(self) -> bool:
        """Whether a person can see it; views show other views, and tell them."""
        return self._is_shown

    @is_shown.setter
    def is_shown(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        for view in views_within(self):
            view.is_shown = is_shown
        if is_shown and self._is_stale:
            self.guarded(self.redraw_soon)()

    def key_pressed(self, key: str) -> None:
        """Undo or redo, where the subject can; called for the outermost view of a page."""
        if key in ("undo", "redo") and hasattr(self.subject, key):
            getattr(self.subject, key)()

    def summary(self) -> str:
        """What a terminal shows: one line, the same on every run."""
        return f"{type(self).__name__}({type(self.subject).__name__})"

    def to_html(self) -> str:
        """What a reader without a kernel sees; no scripts, all escaped."""
        return f"<p>{escape(self.summary())}</p>{STATIC_NOTE}"

    def close(self) -> None:
        while self._endings:
            self._endings.pop()()
        if self.comm is not None:
            for child in self.children:
                close_all(child)
            super().close()
            _close_looks(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_fallback(super()._repr_mimebundle_(**kwargs), self.summary(), self.to_html())


def _words(name: str) -> str:
    """A class name as words.

    >>> _words("LayerTable")
    'layer table'
    """
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def views_within(box: ipywidgets.Box) -> list[View]:
    """The views that a box shows, not those that these show."""
    found: list[View] = []
    for child in box.children:
        if isinstance(child, View):
            found.append(child)
        elif isinstance(child, ipywidgets.Box):
            found += views_within(child)
    return found


def close_all(widget: ipywidgets.Widget) -> None:
    """Close a widget with all that is in it."""
    if isinstance(widget, ipywidgets.Box) and not isinstance(widget, View):
        for child in widget.children:
            close_all(child)
    widget.close()
    _close_looks(widget)


def _close_looks(widget: ipywidgets.Widget) -> None:
    """Layout and style are widgets of their own, which ipywidgets leaves open."""
    for name in ("layout", "style"):
        look = getattr(widget, name, None)
        if isinstance(look, ipywidgets.Widget):
            look.close()
