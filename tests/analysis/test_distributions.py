"""Ranges and histograms against the tensors themselves."""

import numpy as np
import pytest
import torch

import qlab
from qlab.analysis import channel_ranges, histograms
from tests.analysis.small import calibrated, data


def test_weight_ranges_are_those_of_the_channels_and_grids_cover_them():
    sim = calibrated(qlab.presets.w4a8(per_channel=True))
    frame = channel_ranges(sim)
    own = frame[(frame.layer == "left") & (frame.part == "weight")]
    weight = sim["left"].weight.weight.detach().flatten(1)
    assert own["min"].tolist() == weight.amin(1).tolist()
    assert own["max"].tolist() == weight.amax(1).tolist()
    assert own.grid_max.nunique() == 4
    assert (own.grid_max - own["max"] > -1e-6).all()


def test_output_ranges_are_those_of_the_values_that_calibration_saw():
    sim = calibrated()
    frame = channel_ranges(sim)
    own = frame[(frame.layer == "x") & (frame.part == "output")]
    x = torch.cat([batch for batch, _ in data()])
    assert own["min"].tolist() == [float(x.min())]
    assert own["max"].tolist() == [float(x.max())]
    assert own.grid_min.iloc[0] <= float(x.min()) + 0.05


def test_histograms_count_every_weight_and_agree_with_numpy():
    sim = calibrated()
    frame = histograms(sim, bins=16)
    own = frame[(frame.layer == "stem.0") & (frame.part == "weight")]
    counts, edges = np.histogram(sim["stem.0"].weight.weight.detach().numpy(), 16)
    assert own["count"].tolist() == counts.tolist()
    assert own.left.tolist() == pytest.approx(edges[:-1].tolist())
    total = frame.groupby(["layer", "part"])["count"].sum()
    assert total["x", "output"] == sum(batch.numel() for batch, _ in data())


def test_an_uncalibrated_output_is_left_out():
    sim = calibrated()
    sim["head"].output.reset()
    frame = channel_ranges(sim)
    assert "output" not in set(frame[frame.layer == "head"].part)
    assert "weight" in set(frame[frame.layer == "head"].part)
