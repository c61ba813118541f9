"""A value per layer and channel as a heat map: where in the network, and in which channels, something stands out."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from bokeh.models import ColorBar, FixedTicker, LinearColorMapper

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame, texts
from qlab.plots.layer_rows import LayerRows

COLUMNS_SHOWN = 256
_COLUMNS = ("layer", "channel", "last", "value", "left", "right", "top", "bottom", "color")


def heat_map(frame: pd.DataFrame, *, value_name: str = "range", is_log: bool = True) -> "HeatMapFigure":
    """Draw one cell per layer and channel, coloured by cividis; grey where there is no number.

    frame: one row per layer and channel with `layer`, `channel`, `value`.
    is_log: colour by log10 of the value (ranges differ by orders of magnitude); zero and less are then grey.
    Where a layer has more than 256 channels, a cell stands for neighbours and shows their largest value.
    """
    plot = HeatMapFigure(value_name=value_name, is_log=is_log)
    plot.update(frame)
    return plot


class HeatMapFigure(LayerRows):
    """The live heat map. Source columns: those given, `last` (last channel of the cell) and the cell's corners.

    `cells_at(indices)` gives the (layer, first channel, last channel) that were clicked.
    """

    def __init__(self, *, value_name: str = "range", is_log: bool = True):
        super().__init__("channel", _COLUMNS)
        self._is_log, self._value_name = is_log, value_name
        figure = self.figure
        figure.xgrid.visible = False
        figure.toolbar_location = "above"  # at the right it would lie over the colour bar
        cells = figure.quad(
            "left",
            "right",
            "top",
            "bottom",
            source=self.source,
            fill_color="color",
            line_color="color",
            nonselection_alpha=1.0,  # paler ones would be of another colour than the bar's
        )
        cells.selection_glyph = cells.glyph.clone(line_color=theme.ORANGE, line_width=3)
        self._colors = LinearColorMapper(palette=list(theme.HEAT), low=0, high=1)
        self._bar = ColorBar(color_mapper=self._colors, title=value_name, width=12, background_fill_alpha=0)
        theme.style_color_bar(self._bar)
        figure.add_layout(self._bar, "right")
        tips = [("layer", "@layer"), ("channel", "@channel to @last"), (value_name, "@value{0.00000}")]
        theme.add_hover(figure, [cells], tips)

    def update(self, frame: pd.DataFrame) -> None:
        """Show other values in place; the frame as in `heat_map`."""
        frame = read_frame(frame, ("layer", "channel", "value"), "heat_map")
        chosen = self.cells_at(self.source.selected.indices)
        cells = pd.DataFrame(
            {
                "layer": texts(frame, "layer"),
                "channel": numbers(frame, "channel", "heat_map"),
                "value": numbers(frame, "value", "heat_map"),
            }
        )
        count = int(cells.channel.max()) + 1 if len(cells) else 1
        size = -(-count // COLUMNS_SHOWN)
        if size > 1:
            cells["group"] = cells.channel // size
            groups = cells.groupby(["layer", "group"], sort=False)
            cells = groups.agg(
                channel=("channel", "min"), last=("channel", "max"), value=("value", "max")
            ).reset_index()
        else:
            cells["last"] = cells.channel
        rows = {name: row for row, name in enumerate(dict.fromkeys(cells.layer))}
        row = np.array([rows[name] for name in cells.layer], dtype=float)
        value = cells.value.to_numpy(dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            shade = np.log10(value) if self._is_log else value
        finite = shade[np.isfinite(shade)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        self.source.data = {
            "layer": cells.layer.tolist(),
            "channel": cells.channel.to_numpy(),
            "last": cells["last"].to_numpy(),
            "value": value,
            "left": cells.channel.to_numpy() - 0.5,
            "right": cells["last"].to_numpy() + 0.5,
            "top": row - 0.5,
            "bottom": row + 0.5,
            "color": theme.heat_colors(shade, low, high),
        }
        self._colors.update(low=low, high=high if high > low else low + 1.0)
        if self._is_log:
            self._bar.ticker = FixedTicker(ticks=[low, *range(int(np.ceil(low)), int(np.floor(high)) + 1), high])
            ends = {low: f"{10**low:.3g}", high: f"{10**high:.3g}"}
            inside = {
                exponent: theme.decade(exponent) for exponent in range(int(np.ceil(low)), int(np.floor(high)) + 1)
            }
            self._bar.major_label_overrides = inside | ends
        self._set_rows(list(rows))
        theme.set_range(self.figure.x_range, -0.5, count - 0.5)
        at = {cell: i for i, cell in enumerate(self.cells_at(range(len(cells))))} if chosen else {}
        self.source.selected.indices = [at[cell] for cell in chosen if cell in at]
        if not rows:
            self._say(self._value_name, empty="No channels: the frame has no rows.")
            return
        top = int(np.nanargmax(np.where(np.isfinite(value), value, -np.inf)))
        layer, channel = cells.layer[top], int(cells.channel[top])
        grouped = f", in groups of {size}" if size > 1 else ""
        where = f"{theme.elide(layer, 40)} channel {channel}"
        self._say(
            f"{self._value_name}, {len(rows)} layers{grouped}: largest {value[top]:.4g} at {where}{self._more_rows()}"
        )

    def cells_at(self, indices: Iterable[int]) -> list[tuple[str, int, int]]:
        """(layer, first channel, last channel) of the cells at these source rows."""
        data = self.source.data
        return [(data["layer"][i], int(data["channel"][i]), int(data["last"][i])) for i in indices]
