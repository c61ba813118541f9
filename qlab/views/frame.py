"""What stands around every view: its name for screen readers, its errors, its look, and a hold on its keys."""

import traceback
from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets

from qlab.errors import QlabError


class Frame(anywidget.AnyWidget):
    """Put into a view, it shows an exception: its sentence at once, the traceback on demand; else it takes no room.

    The outermost view of a page becomes a region called `label`. on_key: called with 'undo' or 'redo' on Ctrl+Z,
    Ctrl+Y and Ctrl+Shift+Z anywhere in that region.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    label = traitlets.Unicode().tag(sync=True)
    _shown = traitlets.Tuple(
        traitlets.Unicode(), traitlets.Unicode(), traitlets.Unicode(), default_value=("", "", "")
    ).tag(sync=True)

    def __init__(self, label: str) -> None:
        self.error: BaseException | None = None
        self.on_key: Callable[[str], object] | None = None
        super().__init__(label=label)
        self.on_msg(self._receive)

    def show(self, error: BaseException) -> None:
        """Shows an error; those that qlab raises on purpose say all in their sentence and come without a traceback."""
        self.error = error
        trace = "" if isinstance(error, QlabError) else "".join(traceback.format_exception(error))
        self._shown = (type(error).__name__, str(error), trace)

    def clear(self) -> None:
        """Takes the error away."""
        self.error = None
        self._shown = ("", "", "")

    @property
    def text(self) -> str:
        """What is shown; nothing while all is well."""
        kind, sentence, trace = self._shown
        return f"{kind}: {sentence}\n{trace}" if kind else ""

    def _receive(self, _widget: object, message: dict[str, object], _buffers: object) -> None:
        if self.on_key is not None:
            self.on_key(str(message.get("kind")))
