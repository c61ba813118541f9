"""The dashboard: scores, undo and the running job of one lab around tabs, each a view that also works alone."""

from collections.abc import Callable

import ipywidgets

from qlab.errors import Busy
from qlab.lab import Lab
from qlab.views.histogram import Histogram
from qlab.views.job_panel import JobPanel
from qlab.views.layer_table import LayerTable
from qlab.views.layers import Layers
from qlab.views.score import Score
from qlab.views.tabs import tabs_of
from qlab.views.view import View, escape, views_within


class Dashboard(View):
    """What `lab` shows as the last line of a cell. Its tabs are those of `qlab.views.tab`, built when first opened."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self.jobs = JobPanel(lab)
        self.views: dict[str, View] = {}
        self._undo = self._button("Undo", "undo", lab.undo)
        self._redo = self._button("Redo", "repeat", lab.redo)
        self._title = ipywidgets.HTML(layout=ipywidgets.Layout(flex="1 1 0", min_width="0"))
        self._title.add_class("qlab-step")
        self.jobs.layout.flex, self.jobs.layout.min_width = "5 1 500px", "0"
        self._tabs = ipywidgets.Tab()
        self._entries = tabs_of(lab)
        self._tabs.children = [ipywidgets.VBox() for _ in self._entries]
        self._tabs.titles = tuple(entry.title for entry in self._entries)
        self._tabs.observe(self.guarded(lambda _: self._open()), "selected_index")
        self.listen(lab.events.history_changed, self._history_changed)
        self.listen(lab.events.job_ended, lambda _: _forget_refusals(self))
        self._history_changed()
        past = ipywidgets.HBox(
            [self._undo, self._redo, self._title],
            layout=ipywidgets.Layout(align_items="center", flex="2 1 310px", min_width="0"),
        )
        top = ipywidgets.HBox(
            [past, self.jobs],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="2px 12px"),
        )
        self.show(self._entries[0].title)
        self.score = Score(lab)  # last, since it begins to measure, which would take turns with the building
        self.display(self.score, top, self._tabs)
        self.after_cells(lab.refresh)

    def show(self, title: str) -> View:
        """Brings a tab to the front and returns its view; raises KeyError for a title that there is not."""
        titles = [entry.title for entry in self._entries]
        if title not in titles:
            raise KeyError(f"there is no tab {title!r}; there are {titles}.")
        self._tabs.selected_index = titles.index(title)
        self._open()
        return self.views[title]

    @property
    def layers(self) -> Layers:
        """The view of the first tab."""
        view = self.views["Layers"]
        assert isinstance(view, Layers)
        return view

    @property
    def table(self) -> LayerTable:
        """The table of layers."""
        return self.layers.table

    @property
    def histogram(self) -> Histogram:
        """The histogram of the selected layer."""
        return self.layers.histogram

    def summary(self) -> str:
        """One line, the same on every run."""
        return repr(self._lab)

    def to_html(self) -> str:
        """Scores, layers and the histogram without a kernel."""
        return f"<p>{escape(repr(self._lab))}</p>{self.score.to_html()}{self.layers.to_html()}"

    def _open(self) -> None:
        """Builds the view of the chosen tab, if it is not there yet; the others rest."""
        index = self._tabs.selected_index
        if index is None:
            return
        entry = self._entries[index]
        if entry.title not in self.views:
            view = entry.factory(self._lab)
            self.views[entry.title] = view
            self._tabs.children[index].children = [view]
        for title, view in self.views.items():
            view.is_shown = title == entry.title

    def _button(self, name: str, icon: str, action: Callable[[], object]) -> ipywidgets.Button:
        button = ipywidgets.Button(description=name, icon=icon, layout=ipywidgets.Layout(width="76px", flex="0 0 auto"))
        button.on_click(self.guarded(lambda _: action()))
        return button

    def _history_changed(self) -> None:
        lab = self._lab
        self._undo.disabled, self._redo.disabled = not lab.can_undo, not lab.can_redo
        told = escape(f"step {lab.step}: {lab.action}")
        self._title.value = f"<div class='qlab-quiet' title='{told}'>{told}</div>"


def _forget_refusals(view: View) -> None:
    """What was refused while a job ran would be granted now."""
    if isinstance(view.frame.error, Busy):
        view.frame.clear()
    for inner in views_within(view):
        _forget_refusals(inner)
