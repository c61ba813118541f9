"""The channels of all layers at a glance: a heat map of their ranges; a click shows one channel alone."""

from typing import Any

import ipywidgets
import pandas as pd

from qlab.errors import SpecError
from qlab.lab import Lab
from qlab.plots import heat_map
from qlab.views.bokeh_pane import BokehPane
from qlab.views.histogram import PARTS, Histogram
from qlab.views.tabs import tab
from qlab.views.view import View, escape

SHOWN_LAYERS = 64


@tab("Channels", place=12)
class Channels(View):
    """A row a layer, a cell a channel, coloured by the width of its range; beside it the histogram of the one clicked.

    A click selects the layer everywhere. Of more than 64 layers those are shown whose channels differ most: one scale
    a tensor serves these worst.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._lab = lab
        self._is_drawing = False
        self._part = ipywidgets.Dropdown(description="Ranges of", options={"weights": PARTS[0], "outputs": PARTS[1]})
        self._part.style.description_width, self._part.layout.width = "70px", "190px"
        self._said = ipywidgets.HTML()
        self._figure = heat_map(pd.DataFrame({"layer": [], "channel": [], "value": []}), value_name="range")
        self._figure.title_letters = 56  # the tools stand beside it
        self.pane = BokehPane(self._figure.figure, fallback=self._figure.to_svg)
        self.histogram = Histogram(lab)
        self._figure.source.selected.on_change("indices", self.guarded(self._clicked))
        self._part.observe(self.guarded(lambda _: self.redraw_soon()), "value")
        self.redraw_on(lab.events.edited)
        self.pane.layout.flex, self.histogram.layout.flex = "3 1 480px", "2 1 400px"
        self.pane.layout.min_width = self.histogram.layout.min_width = "0"
        bar = ipywidgets.HBox([self._part, self._said], layout=ipywidgets.Layout(align_items="center"))
        main = ipywidgets.HBox(  # reversed: where there is no room beside the map, the histogram stands above it
            [self.pane, self.histogram],
            layout=ipywidgets.Layout(flex_flow="row wrap-reverse", align_items="flex-end", grid_gap="8px 16px"),
        )
        self.display(bar, main)
        self.redraw_soon()

    def redraw(self) -> None:
        """Shows the ranges as they are now."""
        frame = self._lab.channels(self._part.value)
        frame["value"] = frame["max"] - frame["min"]
        counts = frame.groupby("layer", sort=False)["value"].size()
        frame = frame[frame["layer"].isin(counts.index[counts > 1])]
        shown = _most_different(frame)
        self._is_drawing = True
        try:
            with self.pane.batch():
                self._figure.source.selected.indices = []
                self._figure.update(frame[frame["layer"].isin(shown)])
        finally:
            self._is_drawing = False
        self.pane.label = self._figure.headline
        self.pane.layout.display = None if len(shown) else "none"
        layers = frame["layer"].nunique()
        few = f"The {len(shown)} of {layers} layers whose channels differ most. " if len(shown) < layers else ""
        told = f"{few}Click a channel to see it alone." if len(shown) else "No layer has channels that were kept apart."
        self._say(told)

    def to_html(self) -> str:
        """The heat map as it is."""
        return self._said.value + (self.pane.to_html() if self._figure.layers else "")

    def _clicked(self, _attr: str, _old: Any, new: list[int]) -> None:
        if not self._is_drawing and new:
            layer, channel, _ = self._figure.cells_at(new[:1])[0]
            self._lab.select([layer])
            self.histogram.part = self._part.value
            try:
                self.histogram.show_channel(channel)
            except SpecError as refusal:  # of outputs ranges are kept apart by channel, values only where asked for
                self._say(f"{layer}, channel {channel}: {refusal}")

    def _say(self, sentence: str) -> None:
        self._said.value = f"<span class='qlab-quiet' role='status'>{escape(sentence)}</span>"


def _most_different(frame: pd.DataFrame) -> list[str]:
    """The layers whose widest channel is the most times as wide as the narrowest that is not zero."""
    widths = frame[frame["value"] > 0].groupby("layer", sort=False)["value"]
    return list((widths.max() / widths.min()).nlargest(SHOWN_LAYERS).index)
