"""A button that puts text on the clipboard, which ipywidgets cannot."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets


class CopyButton(anywidget.AnyWidget):
    """Copies `text` when pressed, and says so."""

    _esm = Path(__file__).with_suffix(".js")
    description = traitlets.Unicode("Copy").tag(sync=True)
    text = traitlets.Unicode().tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.layout.width = "auto"
