"""What was done, step by step, with the score and the size after each; a click goes back there."""

from pathlib import Path
from typing import Any

import ipywidgets

from qlab.errors import Busy, HistoryError
from qlab.lab import Lab
from qlab.views.compare import Compare
from qlab.views.copy_text import CopyText
from qlab.views.layer_grid import Column, LayerGrid
from qlab.views.tabs import tab
from qlab.views.view import View, escape

SHOWN_STEPS = 200

_COLUMNS = (
    Column("step", "step"),
    Column("state", "", help="● is where the sim is; undone steps can be done again"),
    Column("action", "action"),
    Column("score", "score", format=".4g", help="the lab's score on all data"),
    Column("sqnr", "SQNR", format=".1f", help="of the output on the probe batches, dB"),
    Column("agreement", "agreement", format=".1%", help="with the float model on the probe batches"),
    Column("size", "KiB", format=",.1f", help="all weights at their bits"),
    Column("seconds", "seconds", format=".1f"),
)


class History(View):
    """The steps as a table. A click on one, or Space, goes to its state; steps after it can be done again.

    The last 200 steps are shown; `lab.go_to` reaches all.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.grid = LayerGrid(_COLUMNS, self._rows(), label="history", height_px=240)
        self.grid.on_undo(self.guarded(lab.undo))
        self.grid.on_redo(self.guarded(lab.redo))
        self._is_drawing = False
        self.grid.observe(self.guarded(self._chosen), "selected")
        self.redraw_on(lab.events.history_changed)
        self.display(self.grid)
        self.redraw_soon()

    def redraw(self) -> None:
        """Shows the steps as they are now."""
        rows = self._rows()
        self._is_drawing = True
        try:
            if rows["step"] == self.grid.rows:
                keys = rows.pop("step")
                self.grid.patch({name: dict(zip(keys, values, strict=True)) for name, values in rows.items()})
            else:
                self.grid.reset(rows)
            self.grid.selected = [key for key in [str(self._lab.step)] if key in self.grid.rows]
        finally:
            self._is_drawing = False

    def to_html(self) -> str:
        """The first steps as a plain table."""
        return self.grid.to_html()

    def _rows(self) -> dict[str, list[Any]]:
        frame = self._lab.history.tail(SHOWN_STEPS)
        states = []
        for row in frame.itertuples(index=False):
            lost = "" if row.is_reachable else "✕ "
            states.append(lost + ("●" if row.is_current else "undone" if row.is_undone else ""))
        return {
            "step": [str(step) for step in frame["step"]],
            "state": states,
            "action": list(frame["action"]),
            "score": list(frame["score"]),
            "sqnr": list(frame["sqnr"]),
            "agreement": list(frame["agreement"]),
            "size": [size / 1024 for size in frame["size_bytes"]],
            "seconds": [seconds or None for seconds in frame["seconds"]],
        }

    def _chosen(self, change: Any) -> None:
        added = [key for key in change["new"] if key not in change["old"]]
        if self._is_drawing or not added:
            return
        try:
            if int(added[0]) != self._lab.step:
                self._lab.go_to(int(added[0]))
            self.grid.alert = ""
        except (Busy, HistoryError) as refusal:
            self.grid.alert = str(refusal)
        self.redraw_soon()


class Script(View):
    """Python that reproduces the state, to copy; and the state as a page for a colleague."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._text = CopyText(label="script")
        self._path = ipywidgets.Text(value="report.html", description="Report", layout=ipywidgets.Layout(width="220px"))
        self._path.style.description_width = "46px"
        self._save = ipywidgets.Button(description="Save as HTML", icon="save", layout=ipywidgets.Layout(width="auto"))
        self._saved = ipywidgets.HTML()
        self._save.on_click(self.guarded(lambda _: self.save()))
        self.redraw_on(lab.events.history_changed)
        row = ipywidgets.HBox(
            [self._path, self._save, self._saved],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.display(self._text, row)
        self.redraw_soon()

    @property
    def text(self) -> str:
        """The script shown."""
        return self._text.text

    def save(self) -> Path:
        """Writes the page to the path that was typed."""
        path = self._lab.save_html(Path(self._path.value.strip() or "report.html"))
        self._saved.value = f"<span role='status'>Saved {escape(path)}, {path.stat().st_size / 1e6:.1f} MB</span>"
        return path

    def redraw(self) -> None:
        """Writes the script of the present state."""
        self._text.text = self._lab.script()

    def to_html(self) -> str:
        """The script as text."""
        return f"<pre>{escape(self.text)}</pre>"


@tab("History", place=40)
class Past(View):
    """History, the script of the present state, and the comparison of two steps."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.history, self.script, self.compare = History(lab), Script(lab), Compare(lab)
        self.history.layout.flex, self.script.layout.flex = "3 1 640px", "2 1 300px"
        self.history.layout.min_width = self.script.layout.min_width = "0"
        above = ipywidgets.HBox(
            [self.history, self.script],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="8px 16px"),
        )
        self.display(above, self.compare)

    def to_html(self) -> str:
        """Steps and script without a kernel."""
        return self.history.to_html() + self.script.to_html()
