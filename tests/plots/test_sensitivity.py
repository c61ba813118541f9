"""Sensitivity bars hold the scores, sort by damage, grow while a sweep runs and keep the selection."""

import numpy as np
import pandas as pd
import pytest
from bokeh.models import Legend

from qlab import plots

SCORES = pd.DataFrame({"layer": ["a", "b", "c"], "score": [0.9, 0.5, 0.7], "error": [0.01, 0.02, np.nan]})


def row(plot, layer: str, column: str):
    return plot.source.data[column][plot.source.data["layer"].index(layer)]


def test_bars_run_from_the_baseline_to_the_score():
    plot = plots.sensitivity(SCORES, baseline=0.95)
    assert plot.source.data["score"].tolist() == plot.source.data["end"].tolist() == [0.9, 0.5, 0.7]
    assert plot.source.data["start"].tolist() == [0.95] * 3
    assert (row(plot, "b", "low"), row(plot, "b", "high")) == pytest.approx((0.48, 0.52))
    assert np.isnan(row(plot, "c", "low"))


def test_the_most_damaging_layer_is_first():
    plot = plots.sensitivity(SCORES, baseline=0.95)
    assert plot.layers == ["b", "c", "a"]
    assert row(plot, "b", "row") < row(plot, "c", "row") < row(plot, "a", "row")
    assert plot.headline == "score: 3 layers, worst b (-0.45)"


def test_the_name_of_the_score_can_change():
    plot = plots.sensitivity(SCORES, baseline=0.95)
    plot.update(SCORES, baseline=0.95, score_name="SQNR [dB]")
    assert plot.figure.xaxis[0].axis_label == "SQNR [dB]"
    assert plot.headline.startswith("SQNR [dB]: ")


def test_modes_have_baselines_and_names_of_their_own():
    modes = pd.DataFrame({"layer": ["a", "a", "b", "b"], "mode": ["enabled", "disabled"] * 2})
    plot = plots.sensitivity(modes.assign(score=[0.9, 0.6, 0.8, 0.5]), baseline={"enabled": 0.95, "disabled": 0.5})
    assert plot.source.data["start"].tolist() == [0.95, 0.5, 0.95, 0.5]
    legend = next(item for item in plot.figure.above if isinstance(item, Legend))
    assert [item.label.value for item in legend.items] == ["only this layer quantized", "all but this layer quantized"]


def test_bit_widths_differ_in_colour_and_shape_and_share_the_row():
    data = plots.sensitivity(pd.DataFrame({"layer": ["a", "a"], "bits": [8, 4], "score": [0.9, 0.5]})).source.data
    assert data["series"] == ["8 bits", "4 bits"]
    assert len(set(data["color"])) == len(set(data["marker"])) == 2
    assert data["bottom"][0] <= data["top"][1]
    assert -0.5 < data["row"][0] < data["row"][1] < 0.5


def test_a_layer_that_failed_is_last_and_says_why():
    frame = SCORES.assign(score=[np.nan, 0.5, 0.7], note=["score returned NaN", "", ""])
    plot = plots.sensitivity(frame, baseline=0.95)
    assert plot.layers[-1] == "a"
    assert (row(plot, "a", "marker"), row(plot, "a", "note")) == ("x", "score returned NaN")
    assert "2 of 3 layers measured" in plot.headline


def test_a_bar_with_something_to_say_ends_hollow():
    plot = plots.sensitivity(SCORES.assign(note=["", "of an earlier state", ""]), baseline=0.95)
    assert row(plot, "b", "fill") != row(plot, "b", "color")
    assert row(plot, "a", "fill") == row(plot, "a", "color")


def test_a_growing_sweep_keeps_the_selected_layer():
    plot = plots.sensitivity(SCORES.head(1), baseline=0.95)
    plot.select(["a"])
    plot.update(SCORES.iloc[::-1], baseline=0.95)
    assert plot.layers_at(plot.source.selected.indices) == ["a"]
    assert len(plot.source.data["layer"]) == 3


def test_thirty_rows_are_shown_and_the_rest_is_said():
    names = [f"l{i}" for i in range(100)]
    plot = plots.sensitivity(pd.DataFrame({"layer": names, "score": np.linspace(0, 1, 100)}))
    assert 30 <= abs(plot.figure.y_range.start - plot.figure.y_range.end) < 31
    assert "(drag for 70 more)" in plot.headline
    assert len(plot.source.data["layer"]) == 100


def test_an_unknown_mode_is_refused():
    with pytest.raises(plots.WrongColumns, match=r"also has \['sometimes'\]"):
        plots.sensitivity(SCORES.assign(mode="sometimes"))


def test_a_baseline_that_misses_a_series_is_refused():
    with pytest.raises(plots.WrongColumns, match="no value for series '8 bits'"):
        plots.sensitivity(SCORES.assign(bits=8), baseline={"4 bits": 0.5})
