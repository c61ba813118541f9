"""Simulation against recorded results of aimet-torch 2.42: same scales, same zero points, same simulated outputs.

The BatchNorm is folded by torch.nn.utils.fusion, as the recording folded it first; nothing of qlab takes part in that.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import qlab

RECORDED = Path(__file__).parents[1] / "data" / "reference"
GRANULARITIES = ["per_tensor", "per_channel"]
FOLDING = 5e-7  # two ways to fold a BatchNorm differ in the last bit or two of a float32 weight


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.flatten(self.pool(self.relu2(self.depthwise(self.relu(self.bn(self.conv(x))))))))


@pytest.fixture(scope="module")
def recorded():
    return {name: torch.from_numpy(value) for name, value in np.load(RECORDED / "activations.npz").items()}


@pytest.fixture(scope="module")
def folded():
    model = Reference().eval()
    weights = np.load(RECORDED / "weights.npz")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    model.conv, model.bn = fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()
    return model


def calibrated(folded, recorded, granularity):
    preset = dataclasses.replace(
        qlab.presets.w8a8(per_channel=granularity == "per_channel"), supergroups=(("conv", "relu"),)
    )
    sim = qlab.QuantSim(folded, recorded["input"], preset)
    sim.calibrate([recorded["input"]])
    return sim


def test_the_float_output_is_the_recorded_one(folded, recorded):
    sim = qlab.QuantSim(folded, recorded["input"])
    torch.testing.assert_close(sim.float_output(recorded["input"]), recorded["float_output"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_calibration_finds_the_recorded_activation_encodings(folded, recorded, granularity):
    sim = calibrated(folded, recorded, granularity)
    file = json.loads((RECORDED / "encodings" / f"{granularity}-torch.encodings").read_text())
    compared = 0
    for module, sides in file["activation_encodings"].items():
        for side, entries in sides.items():
            layer = "x" if side == "input" else module
            quantizer, wanted = sim[layer].output, entries["0"]
            assert quantizer.encoding.scale.item() == pytest.approx(wanted["scale"], rel=FOLDING), layer
            assert quantizer.encoding.zero_point.item() == -wanted["offset"], layer
            compared += 1
    assert compared == 6


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_calibration_finds_the_recorded_weight_encodings(folded, recorded, granularity):
    sim = calibrated(folded, recorded, granularity)
    file = json.loads((RECORDED / "encodings" / f"{granularity}-torch.encodings").read_text())
    for name, entries in file["param_encodings"].items():
        encoding = sim[name.removesuffix(".weight")].weight.encoding
        wanted = torch.tensor([entry["scale"] for entry in entries])
        torch.testing.assert_close(encoding.scale.reshape(-1), wanted, rtol=FOLDING, atol=0)
        assert {entry["offset"] for entry in entries} == {encoding.qmin}
    assert sorted(file["param_encodings"]) == ["conv.weight", "depthwise.weight", "fc.weight"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_simulated_output_is_the_recorded_one(folded, recorded, granularity):
    sim = calibrated(folded, recorded, granularity)
    step = sim["fc"].output.encoding.scale.item()
    wanted = recorded[f"sim_output_{granularity}"]
    assert (wanted / step).round().unique().numel() > 20
    torch.testing.assert_close(sim(recorded["input"]), wanted, rtol=0, atol=step * 1e-3)
