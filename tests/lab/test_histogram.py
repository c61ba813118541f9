"""What the histogram view is given: counted on the values themselves, and the same grid as the sim rounds to."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qlab
from qlab.errors import SpecError


def decibel(exact: np.ndarray, rounded: np.ndarray) -> float:
    exact, rounded = exact.astype(np.float64), rounded.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - rounded) ** 2).sum()))


def test_a_weight_is_counted_value_by_value(lab: qlab.Lab) -> None:
    lab.set("stem", "weight", bits=3)
    data = lab.histogram("stem", "weight", bins=32)
    weight = lab.sim["stem"].weight
    values = weight.weight.detach().numpy().ravel()
    rounded = weight.quantized().detach().numpy().ravel()
    assert data.exact
    assert data.counts.sum() == data.quantized_counts.sum() == values.size
    assert len(data.counts) == 32
    assert np.array_equal(data.counts, np.histogram(values, data.edges)[0])
    assert np.array_equal(data.quantized_counts, np.histogram(rounded, data.edges)[0])
    assert data.sqnr == pytest.approx(decibel(values, rounded), rel=1e-6)
    assert data.sqnr == lab.layer_row("stem").weight_sqnr


def test_the_levels_are_the_grid_and_count_what_rounds_to_each(lab: qlab.Lab) -> None:
    lab.set("stem", "weight", bits=3)
    data = lab.histogram("stem", "weight")
    encoding = lab.sim["stem"].weight.encoding
    rounded = lab.sim["stem"].weight.quantized().detach().numpy().ravel()
    assert np.allclose(data.levels["value"], np.arange(-4, 4) * float(encoding.scale), atol=0)
    for value, count in data.levels.itertuples(index=False):
        assert count == np.isclose(rounded, value, atol=1e-7).sum()
    assert (data.low, data.high) == (float(encoding.minimum), float(encoding.maximum))


def test_a_range_can_be_tried_without_setting_it_and_shows_what_setting_it_gives(lab: qlab.Lab) -> None:
    before = lab.histogram("fc", "weight")
    tried = lab.histogram("fc", "weight", bounds=(-0.1, 0.1))
    assert lab.step == 0
    lab.set_range("fc", "weight", -0.1, 0.1)
    now = lab.histogram("fc", "weight")
    assert now.clipped_share == tried.clipped_share > before.clipped_share == 0
    assert (tried.low, tried.high, tried.sqnr) == (now.low, now.high, now.sqnr)
    assert tried.levels.equals(now.levels)
    values = lab.sim["fc"].weight.weight.detach().numpy()
    step = float(now.encoding.scale)
    outside = (values > now.high + step / 2) | (values < now.low - step / 2)
    assert now.clipped_share == pytest.approx(outside.mean())


def test_one_channel_has_its_own_grid(lab: qlab.Lab) -> None:
    lab.set("stem", "weight", bits=4, granularity="per_channel")
    weight = lab.sim["stem"].weight
    whole = lab.histogram("stem", "weight")
    assert whole.levels.empty
    assert whole.sqnr == lab.layer_row("stem").weight_sqnr
    assert len(whole.channels) == 6
    for channel in range(6):
        data = lab.histogram("stem", "weight", channel=channel)
        values = weight.weight.detach()[channel].numpy().ravel()
        assert data.counts.sum() == data.levels["count"].sum() == 27
        assert data.high == float(weight.encoding.maximum[channel])
        assert data.sqnr == pytest.approx(decibel(values, weight.quantized().detach()[channel].numpy().ravel()))
        row = whole.channels.iloc[channel]
        assert (row["min"], row["max"]) == (values.min(), values.max())
        assert row["high"] == data.high


def test_an_output_is_shown_from_calibration(lab: qlab.Lab, batches: list[Tensor]) -> None:
    data = lab.histogram("x", "output", bins=64)
    values = torch.cat(batches).numpy().ravel()
    encoding = lab.sim["x"].output.encoding
    assert not data.exact
    assert data.counts.sum() == values.size
    assert len(data.counts) <= 64
    assert np.array_equal(data.counts, np.histogram(values, data.edges)[0])
    assert (data.channels["min"].min(), data.channels["max"].max()) == (values.min(), values.max())
    assert (data.low, data.high) == (float(encoding.minimum), float(encoding.maximum))
    assert data.sqnr == lab.layer_row("x").output_sqnr


def test_the_picture_clips_nothing_where_the_range_clips_nothing(lab: qlab.Lab, batches: list[Tensor]) -> None:
    data = lab.histogram("x", "output")
    values = torch.cat(batches)
    assert data.clipped_share == 0
    assert data.edges[0] == min(data.low, float(values.min()))
    assert data.edges[-1] == max(data.high, float(values.max()))
    assert qlab.plots.clipped_share(data.bins, float(values.min()), float(values.max())) == pytest.approx(0, abs=1e-3)


def test_the_noise_of_an_output_follows_a_tried_range(lab: qlab.Lab, batches: list[Tensor]) -> None:
    values = torch.cat(batches)
    for high in (1.0, 2.0, 4.0):
        data = lab.histogram("x", "output", bounds=(-high, high))
        lab.set_range("x", "output", -high, high)
        rounded = lab.sim["x"].output(values)
        assert data.sqnr == pytest.approx(decibel(values.numpy(), rounded.numpy()), abs=0.05)
        assert data.clipped_share == pytest.approx(float((values.abs() > high).double().mean()), abs=0.01)


def test_outputs_with_a_grid_for_each_channel_are_shown_whole_and_apart(lab: qlab.Lab, batches: list[Tensor]) -> None:
    lab.set("relu_1", "output", granularity="per_channel")
    lab.calibrate()
    whole = lab.histogram("relu_1", "output")
    assert whole.levels.empty
    assert whole.sqnr > lab.histogram("relu", "output").sqnr - 10
    apart = lab.histogram("relu_1", "output", channel=2)
    assert apart.high == pytest.approx(float(lab.sim["relu_1"].output.encoding.maximum[2]))
    assert apart.counts.sum() * 6 == whole.counts.sum()


def test_what_there_is_not_is_said(lab: qlab.Lab) -> None:
    with pytest.raises(SpecError, match="channel must be 0 to 5; got 6"):
        lab.histogram("stem", "weight", channel=6)
    with pytest.raises(SpecError, match="no histogram per channel"):
        lab.histogram("relu", "output", channel=0)


def test_a_disabled_quantizer_still_shows_what_its_grid_would_do(lab: qlab.Lab) -> None:
    before = lab.histogram("fc", "weight")
    lab.set("fc", "weight", enabled=False)
    data = lab.histogram("fc", "weight")
    assert not data.enabled
    assert data.sqnr == before.sqnr
    assert np.array_equal(data.quantized_counts, before.quantized_counts)


def test_chosen_roundings_are_what_is_shown(lab: qlab.Lab) -> None:
    weight = lab.sim["fc"].weight
    codes = qlab.quantization.quantize(weight.weight, weight.encoding)
    weight.set_rounding((codes + 1).clamp(-128, 127))
    data = lab.histogram("fc", "weight")
    assert data.sqnr == pytest.approx(
        decibel(weight.weight.detach().numpy(), weight.quantized().detach().numpy()), rel=1e-6
    )
    assert data.sqnr < lab.histogram("fc", "weight", bounds=(data.low, data.high)).sqnr


def test_the_error_curve_has_its_minimum_where_the_mse_rule_clips(lab: qlab.Lab) -> None:
    lab.set("x", "output", bits=3, scheme="symmetric", rule="mse")
    curve = lab.error_curve("x", "output", points=100)
    best = curve.loc[curve["error"].idxmin(), "clip"]
    assert best == pytest.approx(float(lab.sim["x"].output.encoding.maximum), rel=0.3)
    assert list(curve.columns) == ["clip", "low", "high", "error"]
    assert curve["clip"].is_monotonic_increasing


def test_the_bins_are_what_the_plot_takes(lab: qlab.Lab) -> None:
    data = lab.histogram("fc", "weight")
    plot = qlab.plots.histogram(data.bins, levels=data.levels, clip=(data.low, data.high))
    assert "24 values" in plot.headline


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60),
    bits=st.integers(2, 8),
    scheme=st.sampled_from(["symmetric", "asymmetric"]),
    bins=st.integers(1, 40),
)
def test_no_value_is_lost_whatever_the_weight(values: list[float], bits: int, scheme: str, bins: int) -> None:
    linear = torch.nn.Linear(len(values), 1)
    linear.weight = torch.nn.Parameter(torch.tensor([values]))
    quantizer = qlab.quantization.WeightQuantizer(qlab.QuantSpec(bits, scheme), "fc", linear, "weight")
    with torch.no_grad():
        data = qlab.lab.histogram.histogram_of(quantizer, "fc", "weight", bins=bins)
    assert data.counts.sum() == data.quantized_counts.sum() == data.levels["count"].sum() == len(values)
    assert isinstance(data.bins, pd.DataFrame)
    assert np.all(np.diff(data.edges) > 0)


def test_the_same_weight_gives_the_same_data(lab: qlab.Lab) -> None:
    twin = copy.deepcopy(lab.sim)
    data = qlab.lab.histogram.histogram_of(twin["fc"].weight, "fc", "weight")
    assert data.bins.equals(lab.histogram("fc", "weight").bins)
