"""The model as a picture: layers coloured by their bits or their noise; a click selects."""

from typing import Any

import ipywidgets
import pandas as pd

from qlab.graph import Layer
from qlab.lab import Lab
from qlab.plots import graph
from qlab.views.bokeh_pane import BokehPane
from qlab.views.tabs import tab
from qlab.views.view import View

VALUES = {
    "weight bits": "weight_bits",
    "output bits": "output_bits",
    "noise (running SQNR), dB": "noise",
    "weight SQNR, dB": "weight_sqnr",
    "output SQNR, dB": "output_sqnr",
}


@tab("Graph", place=50)
class GraphView(View):
    """Hundreds of layers and what flows between them. What is selected here is selected everywhere."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._is_drawing = False
        self._value = ipywidgets.Dropdown(description="Colour by", options=VALUES)
        self._value.style.description_width, self._value.layout.width = "64px", "320px"
        frame = self._frame()
        self._figure = graph(frame, edges_of(lab.sim.graph, set(frame["layer"])), value_name=self._value.label)
        self.pane = BokehPane(self._figure.figure, fallback=self._figure.to_svg, label=self._figure.headline)
        self._figure.source.selected.on_change("indices", self.guarded(self._clicked))
        self._value.observe(self.guarded(lambda _: self.redraw_soon()), "value")
        self.redraw_on(lab.events.edited, lab.events.noise)
        self.listen(lab.events.selected, self._selected)
        self._selected(lab.selected)
        self.redraw()
        self.display(self._value, self.pane)

    def redraw(self) -> None:
        """Paints the layers anew."""
        self._is_drawing = True
        try:
            with self.pane.batch():
                frame = self._frame()
                self._figure.update(frame, value_name=self._value.label, value_range=self._range(frame["value"]))
        finally:
            self._is_drawing = False
        self.pane.label = f"{self._value.label}: {self._figure.headline}"

    def to_html(self) -> str:
        """The picture as it is."""
        return self.pane.to_html()

    def _frame(self) -> pd.DataFrame:
        layers = self._lab.layers()
        value = layers[self._value.value].astype(float)
        return pd.DataFrame(
            {"layer": layers["name"], "value": value, "kind": layers["title"], "note": layers["reason"]}
        )

    def _range(self, value: pd.Series) -> tuple[float, float] | None:
        """Colours of bits stand for the same bits whatever the model has."""
        return (2.0, 16.0 if value.max() > 8 else 8.0) if "bits" in self._value.label else None

    def _clicked(self, _attr: str, _old: Any, new: list[int]) -> None:
        if not self._is_drawing:
            self._lab.select(self._figure.layers_at(new))

    def _selected(self, names: tuple[str, ...]) -> None:
        self._is_drawing = True
        try:
            self._figure.select(names)
        finally:
            self._is_drawing = False


def edges_of(layers: Any, shown: set[str]) -> pd.DataFrame:
    """Who feeds whom among the layers shown; what is not shown is passed over to what feeds it."""
    sources: dict[str, set[str]] = {}
    edges: list[tuple[str, str]] = []
    for layer in layers:
        found = {name for given in layer.inputs for name in _sources(given, shown, sources)}
        sources[layer.name] = found
        if layer.name in shown:
            edges += [(source, layer.name) for source in sorted(found)]
    return pd.DataFrame(edges, columns=["source", "target"])


def _sources(layer: Layer, shown: set[str], known: dict[str, set[str]]) -> set[str]:
    return {layer.name} if layer.name in shown else known.get(layer.name, set())
