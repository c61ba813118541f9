"""A heat map holds one cell per layer and channel, or the largest value of neighbours."""

import numpy as np
import pandas as pd

from qlab import plots
from qlab.plots import theme


def frame(layers: int, channels: int) -> pd.DataFrame:
    cells = pd.MultiIndex.from_product([[f"l{i}" for i in range(layers)], range(channels)], names=["layer", "channel"])
    return cells.to_frame(index=False).assign(value=np.arange(1.0, layers * channels + 1))


def test_cells_hold_the_given_values():
    given = frame(3, 4)
    data = plots.heat_map(given).source.data
    assert [
        list(row) for row in zip(data["layer"], data["channel"], data["value"], strict=True)
    ] == given.values.tolist()
    assert data["left"].tolist()[:2] == [-0.5, 0.5]
    assert data["top"].tolist()[4] == 0.5


def test_the_ends_of_the_colours_are_the_extreme_values():
    plot = plots.heat_map(frame(2, 2), is_log=False)
    data = plot.source.data
    assert (data["color"][0], data["color"][-1]) == (theme.HEAT[0], theme.HEAT[-1])
    mapper = plot.figure.right[0].color_mapper
    assert (mapper.low, mapper.high) == (1.0, 4.0)


def test_what_has_no_colour_is_grey():
    data = plots.heat_map(frame(1, 4).assign(value=[1.0, np.nan, 0.0, 10.0])).source.data
    assert [color == theme.NEUTRAL for color in data["color"]] == [False, True, True, False]


def test_neighbours_share_a_cell_with_their_largest_value():
    plot = plots.heat_map(frame(2, 512))
    assert len(plot.source.data["value"]) == 512
    assert plot.source.data["value"][0] == 2.0
    assert plot.cells_at([0, 256]) == [("l0", 0, 1), ("l1", 0, 1)]


def test_a_clicked_cell_stays_selected_when_values_change():
    plot = plots.heat_map(frame(2, 3))
    plot.source.selected.indices = [4]
    plot.update(frame(2, 3).iloc[::-1])
    assert plot.cells_at(plot.source.selected.indices) == [("l1", 1, 1)]
