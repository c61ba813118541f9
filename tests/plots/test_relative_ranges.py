"""Layers whose channel ranges differ by more than the threshold are flagged, in words and shape too."""

import numpy as np
import pandas as pd
import pytest

from qlab import plots


def frame(**widths: list[float]) -> pd.DataFrame:
    rows = [(layer, i, 0.0, width) for layer, values in widths.items() for i, width in enumerate(values)]
    return pd.DataFrame(rows, columns=["layer", "channel", "min", "max"])


def test_the_spread_is_widest_over_narrowest_and_zero_ranges_do_not_count():
    data = plots.relative_ranges(frame(even=[1, 1, 1], uneven=[0, 0.1, 5.0], dead=[0, 0])).source.data
    assert data["layer"] == ["even", "uneven", "dead"]
    assert data["spread"].tolist() == [1.0, 50.0, 1.0]
    assert data["channels"].tolist() == [3, 3, 2]
    assert (data["narrowest"][1], data["widest"][1]) == (0.1, 5.0)
    assert np.isnan(data["median"][2])


def test_quartiles_are_those_of_the_widths():
    data = plots.relative_ranges(frame(a=[1, 2, 3, 4, 5])).source.data
    assert [data[name][0] for name in ("quarter", "median", "three_quarters")] == [2.0, 3.0, 4.0]
    assert data["log_median"][0] == pytest.approx(np.log10(3))


def test_a_flag_is_a_word_and_a_shape_as_well_as_a_colour():
    plot = plots.relative_ranges(frame(even=[1, 2], uneven=[0.1, 5.0]), threshold=10)
    data = plot.source.data
    assert data["verdict"] == ["", "ranges differ by more than 10×"]
    assert len(set(data["marker"])) == len(set(data["color"])) == 2
    assert plot.headline == "1 of 2 layers differ by more than 10×, most uneven (50×)"


def test_exactly_the_threshold_is_not_flagged():
    assert plots.relative_ranges(frame(a=[1, 20]), threshold=20).source.data["verdict"] == [""]
