"""The dashboard: table, histogram and scores of one lab side by side, with undo and the running job."""

import ipywidgets
from IPython import get_ipython

from qlab.lab import Lab
from qlab.views.histogram import Histogram
from qlab.views.job_panel import JobPanel
from qlab.views.layer_table import LayerTable
from qlab.views.score import Score
from qlab.views.view import View, escape


class Dashboard(View):
    """What `lab` shows as the last line of a cell. Its parts are views that can be used alone as well."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.table = LayerTable(lab)
        self.histogram = Histogram(lab)
        self.score = Score(lab)
        self.jobs = JobPanel(lab)
        self._undo = self._button("Undo", "undo", lab.undo)
        self._redo = self._button("Redo", "repeat", lab.redo)
        self._title = ipywidgets.HTML()
        self.listen(lab.events.history_changed, self._history_changed)
        self.listen(lab.events.error, self.error_box.show)
        self._history_changed()
        top = ipywidgets.HBox(
            [self.score, ipywidgets.VBox([ipywidgets.HBox([self._undo, self._redo, self._title]), self.jobs])],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="4px 24px"),
        )
        self.table.layout.flex, self.table.layout.min_width = "3 1 640px", "0"
        self.histogram.layout.flex, self.histogram.layout.min_width = "2 1 400px", "0"
        main = ipywidgets.HBox(
            [self.table, self.histogram],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="8px 16px"),
        )
        self.display(top, main)
        self._shell = get_ipython()
        if self._shell is not None:
            self._after_cell = self.guarded(lambda *_: lab.refresh())
            self._shell.events.register("post_run_cell", self._after_cell)

    def summary(self) -> str:
        """One line, the same on every run."""
        return repr(self._lab)

    def to_html(self) -> str:
        """Scores, layers and the histogram without a kernel."""
        return f"<p>{escape(repr(self._lab))}</p>{self.score.to_html()}{self.table.to_html()}{self.histogram.to_html()}"

    def close(self) -> None:
        """Ends all subscriptions and closes the parts."""
        if self._shell is not None:
            self._shell.events.unregister("post_run_cell", self._after_cell)
            self._shell = None
        for part in (self.table, self.histogram, self.score, self.jobs):
            part.close()
        super().close()

    def _button(self, name: str, icon: str, action: object) -> ipywidgets.Button:
        button = ipywidgets.Button(description=name, icon=icon, layout=ipywidgets.Layout(width="84px"))
        button.on_click(self.guarded(lambda _: action()))  # type: ignore[operator]
        return button

    def _history_changed(self) -> None:
        lab = self._lab
        self._undo.disabled, self._redo.disabled = not lab.can_undo, not lab.can_redo
        actions = list(lab.history["action"])
        self._title.value = f"<small>step {lab.step}: {escape(actions[lab.step])}</small>"
