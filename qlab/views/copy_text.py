"""Text to take along, such as a script: readable, selectable, and copied by one button, which ipywidgets cannot."""

from pathlib import Path

import anywidget
import traitlets


class CopyText(anywidget.AnyWidget):
    """Shows `text` in a box that cannot be written to, with a button that puts it on the clipboard."""

    _esm = Path(__file__).with_suffix(".js")
    label = traitlets.Unicode().tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)
