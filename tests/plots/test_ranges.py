"""Channel ranges hold the given minima and maxima, and groups of channels their extremes and medians."""

import numpy as np
import pandas as pd
import pytest

from qlab import plots

NOW = pd.DataFrame({"channel": [0, 1, 2], "min": [-1.0, -2.0, 0.0], "max": [1.0, 2.0, 0.0]})


def test_each_channel_is_a_bar_from_its_min_to_its_max():
    plot = plots.weight_ranges(NOW, before=NOW.assign(max=9.0))
    assert plot.now.data["low"].tolist() == plot.now.data["min"].tolist() == [-1.0, -2.0, 0.0]
    assert plot.now.data["high"].tolist() == plot.now.data["max"].tolist() == [1.0, 2.0, 0.0]
    assert plot.before.data["high"].tolist() == [9.0, 9.0, 9.0]


def test_the_headline_compares_the_widest_with_the_narrowest_channel_that_is_not_zero():
    before = NOW.assign(max=[1.0, 38.0, 0.0])
    assert plots.weight_ranges(NOW, before=before).headline == "3 channels, widest 2× the narrowest, 20× before"


def test_more_than_512_channels_are_summarised_in_groups():
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"channel": range(1024), "min": -random.random(1024), "max": random.random(1024)})
    plot = plots.weight_ranges(frame)
    low, high = frame["min"].to_numpy().reshape(128, 8), frame["max"].to_numpy().reshape(128, 8)
    assert plot.now.data["min"].tolist() == low.min(axis=1).tolist()
    assert plot.now.data["max"].tolist() == high.max(axis=1).tolist()
    assert plot.now.data["low"] == pytest.approx(np.median(low, axis=1))
    assert plot.now.data["high"] == pytest.approx(np.median(high, axis=1))
    assert plot.channels_at([1]) == list(range(8, 16))


def test_the_view_contains_every_bar():
    y_range = plots.weight_ranges(NOW, before=NOW * 5).figure.y_range
    assert y_range.start < -10
    assert y_range.end > 10


def test_what_was_before_can_be_taken_away():
    plot = plots.weight_ranges(NOW, before=NOW)
    plot.update(NOW)
    assert len(plot.before.data["min"]) == 0
    assert "before" not in plot.headline
