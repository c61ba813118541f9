"""The graph holds each layer's value and each edge's ends, and repaints without moving."""

import numpy as np
import pandas as pd
import pytest

from qlab import plots
from qlab.plots import theme

LAYERS = pd.DataFrame({"layer": ["a", "b", "c"], "value": [1.0, np.nan, 3.0]})
EDGES = pd.DataFrame({"source": ["a", "b"], "target": ["b", "c"]})


def test_marks_and_edges_are_where_they_were_put():
    plot = plots.graph(LAYERS.assign(x=[0.0, 1.0, 5.0], y=[0.0, 0.0, 2.0]), EDGES)
    assert plot.source.data["x"].tolist() == [0.0, 1.0, 5.0]
    assert plot.edges.data["x0"].tolist() == [0.0, 1.0]
    assert (plot.edges.data["x1"].tolist(), plot.edges.data["y1"].tolist()) == ([1.0, 5.0], [0.0, 2.0])


def test_colour_follows_the_value_and_missing_values_have_a_shape_of_their_own():
    data = plots.graph(LAYERS, EDGES).source.data
    assert data["color"] == [theme.HEAT[0], theme.NEUTRAL, theme.HEAT[-1]]
    assert data["marker"] == ["square", "x", "square"]


def test_repainting_keeps_places_edges_and_selection():
    plot = plots.graph(LAYERS, EDGES)
    plot.select(["c"])
    x, edges = list(plot.source.data["x"]), plot.edges.data
    plot.update(LAYERS.assign(value=[3.0, 2.0, 1.0]))
    assert list(plot.source.data["x"]) == x
    assert plot.edges.data is edges
    assert plot.source.data["value"].tolist() == [3.0, 2.0, 1.0]
    assert plot.layers_at(plot.source.selected.indices) == ["c"]


def test_an_edge_to_an_unknown_layer_is_named():
    with pytest.raises(ValueError, match="'z'"):
        plots.graph(LAYERS, pd.DataFrame({"source": ["a"], "target": ["z"]}))


def test_a_skip_over_layers_of_its_own_line_is_bent():
    edges = plots.graph(LAYERS, pd.DataFrame({"source": ["a", "b", "a"], "target": ["b", "c", "c"]})).edges.data
    bend = edges["cy"] - (edges["y0"] + edges["y1"]) / 2
    assert bend[:2].tolist() == [0, 0]
    assert bend[2] > 0.5


def test_hundreds_of_layers_are_folded_to_fill_the_figure():
    names = [f"l{i}" for i in range(300)]
    plot = plots.graph(pd.DataFrame({"layer": names}), pd.DataFrame({"source": names[:-1], "target": names[1:]}))
    assert np.ptp(plot.source.data["x"]) < 60
    assert len(set(zip(plot.source.data["x"], plot.source.data["y"], strict=True))) == 300
