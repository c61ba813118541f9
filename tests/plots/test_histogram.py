"""The histogram holds the counts it was given, draws both at one scale, and clips what it says."""

import numpy as np
import pandas as pd
import pytest

from qlab import plots
from qlab.plots.histogram import merged, thinned

BINS = pd.DataFrame({"left": [-1.0, -0.5, 0.0, 0.5], "right": [-0.5, 0.0, 0.5, 1.0], "count": [1, 4, 4, 1]})
LEVELS = pd.DataFrame({"value": [-0.25, 0.0, 0.25], "count": [3, 4, 3]})


def data(source) -> pd.DataFrame:
    return pd.DataFrame(dict(source.data))


def test_the_sources_hold_the_given_numbers():
    error = pd.DataFrame({"clip": [0.5, 1.0], "error": [0.2, 0.1]})
    plot = plots.histogram(BINS, levels=LEVELS, error=error)
    assert data(plot.bins)[["left", "right", "count"]].equals(BINS.astype(float))
    assert data(plot.levels)[["value", "count"]].equals(LEVELS.astype(float))
    assert plot.grid.data["value"].tolist() == [-0.25, 0.0, 0.25]
    assert data(plot.error).equals(error)


def test_counts_per_level_are_drawn_with_the_area_of_the_bins():
    plot = plots.histogram(BINS, levels=LEVELS)
    assert (data(plot.bins)["top"] * 0.5).sum() == pytest.approx(5.0)
    assert (data(plot.levels)["top"] * 0.25).sum() == pytest.approx(5.0)


def test_the_clipped_share_is_in_the_title():
    # the edge at 0.75 cuts the last bin in half: 0.5 of 10 values; the edge at -1 cuts nothing
    assert "clips 5.00%" in plots.histogram(BINS, clip=(-1.0, 0.75)).headline


def test_clip_lines_stay_where_they_are_dragged_when_updated_without_clip():
    plot = plots.histogram(BINS, clip=(-0.5, 0.5))
    plot.clip.left = -0.75  # what the browser does
    plot.update(BINS, levels=LEVELS)
    assert (plot.clip.left, plot.clip.right) == (-0.75, 0.5)
    assert "range [-0.75, 0.5]" in plot.headline


def test_moving_the_clip_moves_lines_and_title_only():
    plot = plots.histogram(BINS, clip=(-0.5, 0.5))
    before = plot.bins.data
    plot.move_clip(-1.0, 1.0)
    assert (plot.clip.left, plot.clip.right) == (-1.0, 1.0)
    assert "clips 0.00%" in plot.headline
    assert plot.bins.data is before


def test_clip_lines_can_be_dragged_sideways_only():
    clip = plots.histogram(BINS, clip=(-0.5, 0.5)).clip
    assert (clip.editable, clip.resizable, clip.movable) == (True, "x", "none")


def test_log_counts_are_drawn_as_exponents_and_kept_as_counts():
    plot = plots.histogram(BINS, counts="log")
    assert plot.bins.data["top"] == pytest.approx(np.log10([1, 4, 4, 1]))
    assert plot.figure.yaxis[0].major_label_overrides[2] == "100"
    plot.set_counts("linear")
    assert plot.bins.data["top"].tolist() == plot.bins.data["count"].tolist() == [1, 4, 4, 1]
    assert not plot.figure.yaxis[0].major_label_overrides


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="'linear' or 'log', not 'cubic'"):
        plots.histogram(BINS, counts="cubic")


def test_many_levels_are_a_step_line_and_a_thinned_grid():
    plot = plots.histogram(BINS, levels=pd.DataFrame({"value": (np.arange(256) - 100) * 0.01, "count": 1}))
    shown = [item for item in plot.figure.renderers if item.data_source is plot.levels and item.visible]
    assert [type(item.glyph).__name__ for item in shown] == ["Step"]
    grid = plot.grid.data["value"]
    assert 0.0 in grid
    assert np.allclose(np.diff(grid), 0.04)


@pytest.mark.parametrize("bits", range(2, 17))
def test_a_thinned_grid_keeps_zero_and_an_even_step(bits):
    kept = thinned((np.arange(2**bits) - 3.0) * 0.5)
    assert len(kept) == min(2**bits, 64)
    assert 0.0 in kept
    assert len(set(np.diff(kept))) == 1


def test_merged_levels_keep_the_total():
    value, count = merged(np.arange(1000.0), np.arange(1000), 64)
    assert len(value) <= 64
    assert count.sum() == 999 * 500
    assert value[0] == 7.5  # of levels 0 to 15


def test_a_constant_tensor_has_a_histogram():
    plot = plots.histogram(pd.DataFrame({"left": [2.0], "right": [2.0], "count": [7]}), clip=(0.0, 2.0))
    assert plot.headline == "7 values, range [0, 2] clips 0.00%"


@pytest.mark.parametrize(("low", "high", "share"), [(-9, 9, 0.0), (-0.5, 0.5, 0.2), (0.0, 0.25, 0.8), (5, 6, 1.0)])
def test_the_clipped_share_counts_what_lies_outside(low, high, share):
    assert plots.clipped_share(BINS, low, high) == pytest.approx(share)
