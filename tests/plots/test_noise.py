"""Noise bars keep execution order, and mark what is below the limit, exact, or not measured."""

import numpy as np
import pandas as pd

from qlab import plots

FRAME = pd.DataFrame({"layer": ["a", "b", "c", "d"], "sqnr": [30.0, 12.5, np.inf, np.nan]})


def test_values_and_order_are_those_given():
    plot = plots.noise(FRAME)
    assert plot.layers == ["a", "b", "c", "d"]
    assert np.array_equal(plot.source.data["sqnr"], FRAME["sqnr"], equal_nan=True)
    assert plot.source.data["end"][:2].tolist() == [30.0, 12.5]


def test_verdicts_are_words_and_shapes():
    data = plots.noise(FRAME, limit=20).source.data
    assert data["verdict"] == ["", "below 20 dB", "exact", "not measured"]
    assert len(set(data["marker"])) == 4


def test_the_headline_counts_layers_below_the_limit():
    assert plots.noise(FRAME).headline == "1 of 4 layers below 20 dB, lowest 12.5 dB at b"


def test_weight_and_output_share_a_row():
    plot = plots.noise(pd.DataFrame({"layer": ["a", "a"], "tensor": ["weight", "output"], "sqnr": [30.0, 10.0]}))
    assert plot.layers == ["a"]
    assert np.allclose(plot.source.data["row"], [-0.2, 0.2])
    plot.select(["a"])
    assert plot.source.selected.indices == [0, 1]


def test_exact_everywhere_is_not_an_error():
    assert plots.noise(pd.DataFrame({"layer": ["a"], "sqnr": [np.inf]})).headline == "0 of 1 layers below 20 dB"
