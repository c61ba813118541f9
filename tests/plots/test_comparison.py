"""Dumbbells hold both values and say which way each layer went."""

import pandas as pd

from qlab import plots

FRAME = pd.DataFrame({"layer": ["a", "b", "c"], "before": [10.0, 10.0, 10.0], "after": [12.0, 9.0, 10.0]})


def test_both_values_and_their_difference_are_held():
    data = plots.comparison(FRAME).source.data
    assert data["before"].tolist() == [10.0, 10.0, 10.0]
    assert data["after"].tolist() == [12.0, 9.0, 10.0]
    assert data["change"].tolist() == [2.0, -1.0, 0.0]


def test_worse_is_a_shape_as_well_as_a_colour_and_depends_on_the_measure():
    assert plots.comparison(FRAME).source.data["marker"] == ["diamond", "inverted_triangle", "diamond"]
    lower = plots.comparison(FRAME, value_name="MSE", higher_is_better=False)
    assert lower.source.data["marker"] == ["inverted_triangle", "diamond", "diamond"]
    assert lower.headline == "1 layers better, 1 worse, of 3"
