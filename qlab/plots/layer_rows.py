"""The axis that sensitivity, noise and comparison share: one row per layer, the name at the left, click to select.

Rows are numbers with text labels, not factors, so that a live figure can sort itself without a new axis. About thirty
rows are shown; the rest is reached by dragging.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, FixedTicker, Legend, LegendItem, Range1d

from qlab.plots import theme
from qlab.plots.plot import Plot

SHOWN_ROWS = 30
ROW_HEIGHT = 18
NAME_LENGTH = 34


class LayerRows(Plot):
    """Base of figures with a row per layer; subclasses fill `source`, whose rows carry a `layer` column.

    A view links selection both ways:

        plot.source.selected.on_change("indices", lambda attr, old, new: chosen(plot.layers_at(new)))
        plot.select(["layer1.0.conv1"])
    """

    def __init__(self, x_label: str, columns: Sequence[str], **options: Any):
        figure = theme.new_figure(
            x_label, "", tools="ypan,ywheel_pan,tap,reset,save", y_range=Range1d(0.5, -0.5), **options
        )
        super().__init__(figure)
        self.source = ColumnDataSource({column: [] for column in columns})
        self.layers: list[str] = []
        figure.ygrid.visible = False
        figure.yaxis.major_tick_in = figure.yaxis.major_tick_out = 0
        self._legend = Legend(items=[])
        theme.style_legend(self._legend)
        figure.add_layout(self._legend, "above")

    def select(self, layers: Iterable[str]) -> None:
        """Select every mark of these layers, as a click would."""
        wanted = set(layers)
        self.source.selected.indices = [i for i, layer in enumerate(self.source.data["layer"]) if layer in wanted]

    def layers_at(self, indices: Iterable[int]) -> list[str]:
        """The layers of the marks at these source rows, each once."""
        return list(dict.fromkeys(self.source.data["layer"][i] for i in indices))

    def _set_rows(self, layers: Sequence[str]) -> None:
        """Label one row per layer, first at the top, and size the figure."""
        shown = min(len(layers), SHOWN_ROWS)
        if list(layers) != self.layers:
            self.layers = list(layers)
            axis = self.figure.yaxis[0]
            axis.ticker = FixedTicker(ticks=list(range(len(layers))))
            names = [theme.plain(theme.elide(" ".join(layer.split()), NAME_LENGTH)) for layer in layers]
            axis.major_label_overrides = dict(enumerate(names))
        self.figure.yaxis.visible = bool(layers)
        self.figure.y_range.bounds = (-0.7, max(len(layers), 1) - 0.3)
        theme.set_range(self.figure.y_range, max(shown, 1) - 0.4, -0.6)
        self.figure.height = 105 + ROW_HEIGHT * max(shown, 4)

    def _set_legend(self, labels: Sequence[tuple[str, list, int | None]]) -> None:
        """Show (label, renderers, row of the source that has the label's look) unless there is only one."""
        labels = labels if len(labels) > 1 else []
        self._legend.items = [
            LegendItem(label={"value": label}, renderers=renderers, index=index) for label, renderers, index in labels
        ]

    def _more_rows(self) -> str:
        hidden = len(self.layers) - SHOWN_ROWS
        return f" (drag for {hidden} more)" if hidden > 0 else ""
