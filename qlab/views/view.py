"""The base of every view: it holds a subject, follows the subject's events, and never loses an error.

A view is an ordinary ipywidgets box. What it adds: callbacks whose exceptions are shown in the view, event
subscriptions that end when it closes, and a static picture for whoever reads the notebook without running it.
"""

import functools
import html
import os
import traceback
from collections.abc import Callable
from typing import Any

import ipywidgets
from psygnal import SignalInstance

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


class ErrorBox(ipywidgets.HTML):
    """Shows an exception: its sentence at once, the traceback on demand; takes no room while all is well."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        super().__init__(layout=ipywidgets.Layout(display="none"))

    def show(self, error: BaseException) -> None:
        self.error = error
        details = "".join(traceback.format_exception(error))
        self.value = (
            '<div class="qlab-error" role="alert" style="border-left: 3px solid var(--jp-error-color1, #d32f2f);'
            ' padding: 2px 8px; line-height: 1.5; overflow-wrap: anywhere">'
            f"<b>{escape(type(error).__name__)}</b>: {escape(error)}"
            f"<details><summary>Traceback</summary><pre>{escape(details)}</pre></details></div>"
        )
        self.layout.display = None

    def clear(self) -> None:
        self.error = None
        self.value = ""
        self.layout.display = "none"


def guarded(callback: Callable[..., Any], box: ErrorBox) -> Callable[..., Any]:
    """Wrap a callback so that its exception is shown in the box; when strict it is raised as well.

    The next call of the same callback that succeeds clears the box; other callbacks leave it alone.
    """
    failed = False

    @functools.wraps(callback)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        try:
            result = callback(*args, **kwargs)
        except Exception as error:  # a view shows it to the person
            failed = True
            box.show(error)
            if is_strict():
                raise
            return None
        if failed:
            failed = False
            box.clear()
        return result

    return call


class View(ipywidgets.VBox):
    """A widget on a subject (a Lab): build the content, `display` it, and `listen` to the subject's events.

    Subclasses override `summary` (text/plain) and `to_html` (the still picture). `close` ends the subscriptions
    and closes everything displayed; it may be called twice.
    """

    def __init__(self, subject: Any) -> None:
        self.subject = subject
        self.error_box = ErrorBox()
        self._subscriptions: list[tuple[SignalInstance, Callable[..., Any]]] = []
        super().__init__(children=[self.error_box])
        self.add_class("qlab-view")

    def display(self, *widgets: ipywidgets.Widget) -> None:
        """Replace the content; the place for errors stays beneath it."""
        self.children = [*widgets, self.error_box]

    def guarded(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a callback so that its errors are shown in this view."""
        return guarded(callback, self.error_box)

    def listen(self, signal: SignalInstance, callback: Callable[..., Any]) -> None:
        """Call back, guarded, on every emission until this view closes."""
        call = self.guarded(callback)
        signal.connect(call)
        self._subscriptions.append((signal, call))

    def summary(self) -> str:
        """What a terminal shows: one line, the same on every run."""
        return f"{type(self).__name__}({type(self.subject).__name__})"

    def to_html(self) -> str:
        """What a reader without a kernel sees; no scripts, all escaped."""
        return f"<p>{escape(self.summary())}</p>{STATIC_NOTE}"

    def close(self) -> None:
        while self._subscriptions:
            signal, call = self._subscriptions.pop()
            signal.disconnect(call, missing_ok=True)
        if self.comm is not None:
            _close_content(self)
            super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return with_fallback(super()._repr_mimebundle_(**kwargs), self.summary(), self.to_html())


def _close_content(box: ipywidgets.Box) -> None:
    for child in box.children:
        if isinstance(child, ipywidgets.Box) and not isinstance(child, View):
            _close_content(child)
        child.close()
