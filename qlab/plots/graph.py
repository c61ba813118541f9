"""The model as a picture: a mark per layer, coloured by a value, with the edges between them; a click selects."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from bokeh.models import ColorBar, ColumnDataSource, HoverTool, LinearColorMapper

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame, texts
from qlab.plots.layered_layout import layered_layout
from qlab.plots.plot import Plot

NAMED_LAYERS = 40  # up to here every mark has its name beside it; hover has it always
ARROWS = 150


def graph(
    frame: pd.DataFrame,
    edges: pd.DataFrame,
    *,
    value_name: str = "value",
    value_range: tuple[float, float] | None = None,
) -> "GraphFigure":
    """Draw layers and edges, hundreds of them.

    frame: one row per layer with `layer`, and optionally `value` (colour; NaN is a grey cross), `kind`, `note` (hover),
        and `x`, `y`; without positions they are computed by `layered_layout` and folded to fill the figure.
    edges: `source`, `target`, layer names.
    value_range: what the ends of the colours stand for; default the values' own extent.
    """
    plot = GraphFigure(value_name=value_name)
    plot.update(frame, edges, value_range=value_range)
    return plot


class GraphFigure(Plot):
    """The live graph. Sources: `source` (layer, value, kind, note, x, y, ...) and `edges`.

    `source.selected.indices` are the clicked layers, `layers_at(indices)` their names, `select(layers)` the other way.
    """

    def __init__(self, *, value_name: str = "value"):
        figure = theme.new_figure("", "", tools="pan,wheel_zoom,tap,reset,save", height=360)
        super().__init__(figure)
        figure.toolbar_location = "above"  # at the right it would lie over the colour bar
        figure.axis.visible = False
        figure.grid.visible = False
        self._value_name = value_name
        self._given: pd.DataFrame | None = None
        self.edges = ColumnDataSource({column: [] for column in ("x0", "y0", "cx", "cy", "x1", "y1")})
        self._arrows = ColumnDataSource({"x": [], "y": [], "angle": []})
        columns = ("layer", "value", "kind", "note", "x", "y", "color", "marker", "size", "name")
        self.source = ColumnDataSource({column: [] for column in columns})
        figure.quadratic(
            x0="x0",
            y0="y0",
            cx="cx",
            cy="cy",
            x1="x1",
            y1="y1",
            source=self.edges,
            line_color=theme.NEUTRAL,
            line_alpha=0.7,
        )
        figure.scatter("x", "y", source=self._arrows, marker="triangle", angle="angle", size=6, color=theme.NEUTRAL)
        marks = figure.scatter(
            "x",
            "y",
            source=self.source,
            marker="marker",
            size="size",
            fill_color="color",
            line_color=theme.NEUTRAL,
            nonselection_alpha=1.0,  # paler ones would be of another colour than the bar's
        )
        marks.selection_glyph = marks.glyph.clone(line_color=theme.ORANGE, line_width=3)
        figure.text(
            "x",
            "y",
            text="name",
            source=self.source,
            text_color=theme.NEUTRAL,
            text_font_size="10px",
            text_font={"value": theme.FONT},
            text_align="center",
            y_offset=18,
        )
        self._colors = LinearColorMapper(palette=list(theme.HEAT), low=0, high=1)
        self._bar = ColorBar(
            color_mapper=self._colors, title=value_name, width=12, background_fill_alpha=0, visible=False
        )
        theme.style_color_bar(self._bar)
        figure.add_layout(self._bar, "right")
        theme.add_hover(figure, [marks], _tips(value_name))

    def update(
        self,
        frame: pd.DataFrame,
        edges: pd.DataFrame | None = None,
        *,
        value_name: str | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        """Show other values in place; without `edges` the graph stays and only its layers are painted anew."""
        if value_name is not None and value_name != self._value_name:
            self._name_value(value_name)
        frame = read_frame(frame, ("layer",), "graph")
        layer = texts(frame, "layer")
        chosen = self.layers_at(self.source.selected.indices)
        if edges is not None:
            self._given = read_frame(edges, ("source", "target"), "graph(edges=...)")
        x, y = self._positions(frame, layer)
        value = numbers(frame, "value", "graph") if "value" in frame.columns else np.full(len(frame), np.nan)
        finite = value[np.isfinite(value)]
        low, high = value_range or ((float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0))
        size = 14 if len(layer) <= 100 else 10 if len(layer) <= 300 else 7
        self.source.data = {
            "layer": layer,
            "value": value,
            "kind": texts(frame, "kind"),
            "note": texts(frame, "note"),
            "x": x,
            "y": y,
            "color": theme.heat_colors(value, low, high),
            "size": np.full(len(layer), float(size)),
            "marker": ["square" if np.isfinite(number) else "x" for number in value],
            "name": [theme.elide(name.split(".", 1)[-1], 12) if len(layer) <= NAMED_LAYERS else "" for name in layer],
        }
        self._bar.visible = bool(len(finite))
        self._colors.update(low=low, high=high if high > low else low + 1.0)
        if edges is not None:
            self._draw_edges(dict(zip(layer, zip(x, y, strict=True), strict=True)))
        self.select(chosen)
        if not layer:
            self._say("model", empty="The graph has no layers.")
            return
        count = len(self.edges.data["x0"])
        extent = f", {self._value_name} {finite.min():.4g} to {finite.max():.4g}" if len(finite) else ""
        self._say(f"{len(layer)} layers, {count} edges{extent}")

    def select(self, layers: Iterable[str]) -> None:
        """Select these layers, as clicks would."""
        wanted = set(layers)
        self.source.selected.indices = [i for i, layer in enumerate(self.source.data["layer"]) if layer in wanted]

    def layers_at(self, indices: Iterable[int]) -> list[str]:
        """The layers at these rows of `source`."""
        return [self.source.data["layer"][i] for i in indices]

    def _name_value(self, value_name: str) -> None:
        self._value_name = self._bar.title = value_name
        self.figure.select_one(HoverTool).tooltips = _tips(value_name)

    def _positions(self, frame: pd.DataFrame, layer: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if {"x", "y"} <= set(frame.columns):
            x, y = numbers(frame, "x", "graph"), numbers(frame, "y", "graph")
        elif layer == self.source.data["layer"]:
            return self.source.data["x"], self.source.data["y"]
        else:
            edges = (
                []
                if self._given is None
                else list(zip(texts(self._given, "source"), texts(self._given, "target"), strict=True))
            )
            placed = layered_layout(layer, edges, fold=_fold(layer, edges))
            x, y = placed.x.to_numpy(), placed.y.to_numpy()
        if len(x):
            theme.set_range(self.figure.x_range, x.min() - 0.8, x.max() + 0.8)
            theme.set_range(self.figure.y_range, y.min() - 1.2, y.max() + 1.2)
            self.figure.height = int(np.clip(100 + 44 * (y.max() - y.min() + 1), 220, 760))
        return x, y

    def _draw_edges(self, places: dict[str, tuple[float, float]]) -> None:
        ends = zip(texts(self._given, "source"), texts(self._given, "target"), strict=True)
        corners = np.array([[*places[source], *places[target]] for source, target in ends], dtype=float).reshape(-1, 4)
        x0, y0, x1, y1 = corners.T
        # an edge that skips layers of its own line is bent so that they do not hide it
        bend = np.where((abs(x1 - x0) > 1.5) & (abs(y1 - y0) < 0.5), 0.45 * np.sqrt(abs(x1 - x0)) + 0.35, 0.0)
        cx, cy = (x0 + x1) / 2, (y0 + y1) / 2 + bend
        self.edges.data = {"x0": x0, "y0": y0, "cx": cx, "cy": cy, "x1": x1, "y1": y1}
        some = slice(0, len(corners) if len(corners) <= ARROWS else 0)
        angle = np.arctan2((y1 - y0) * 1.5, x1 - x0) - np.pi / 2
        self._arrows.data = {"x": ((x0 + x1) / 2)[some], "y": ((y0 + y1) / 2 + bend / 2)[some], "angle": angle[some]}


def _tips(value_name: str) -> list[tuple[str, str]]:
    return [("layer", "@layer"), ("kind", "@kind"), (value_name, "@value{0.000}"), ("", "@note")]


def _fold(layer: list[str], edges: list[tuple[str, str]]) -> int | None:
    """Depths per band so that the folded picture is about three times as wide as high."""
    depth = int(layered_layout(layer, edges).depth.max()) + 1 if layer else 1
    return None if depth <= 14 else max(14, round(np.sqrt(depth * 6)))
