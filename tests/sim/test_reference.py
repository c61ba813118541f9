"""Simulation against recorded results of aimet-torch 2.42: same scales, same zero points, same simulated outputs.

The BatchNorm is folded by torch.nn.utils.fusion, as the recording folded it first; nothing of qlab takes part in that.
"""

import dataclasses
import json

import pytest
import torch

import qlab
from tests.reference import GRANULARITIES, RECORDED, Reference, recorded

FOLDING = 5e-7  # two ways to fold a BatchNorm differ in the last bit or two of a float32 weight


def calibrated(granularity):
    preset = dataclasses.replace(
        qlab.presets.w8a8(per_channel=granularity == "per_channel"), supergroups=(("conv", "relu"),)
    )
    sim = qlab.QuantSim(Reference(), recorded()["input"], preset)
    sim.calibrate([recorded()["input"]])
    return sim


def test_the_float_output_is_the_recorded_one():
    sim = qlab.QuantSim(Reference(), recorded()["input"])
    torch.testing.assert_close(sim.float_output(recorded()["input"]), recorded()["float_output"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_calibration_finds_the_recorded_activation_encodings(granularity):
    sim = calibrated(granularity)
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
def test_calibration_finds_the_recorded_weight_encodings(granularity):
    sim = calibrated(granularity)
    file = json.loads((RECORDED / "encodings" / f"{granularity}-torch.encodings").read_text())
    for name, entries in file["param_encodings"].items():
        encoding = sim[name.removesuffix(".weight")].weight.encoding
        wanted = torch.tensor([entry["scale"] for entry in entries])
        torch.testing.assert_close(encoding.scale.reshape(-1), wanted, rtol=FOLDING, atol=0)
        assert {entry["offset"] for entry in entries} == {encoding.qmin}
    assert sorted(file["param_encodings"]) == ["conv.weight", "depthwise.weight", "fc.weight"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_simulated_output_is_the_recorded_one(granularity):
    sim = calibrated(granularity)
    step = sim["fc"].output.encoding.scale.item()
    wanted = recorded()[f"sim_output_{granularity}"]
    assert (wanted / step).round().unique().numel() > 20
    torch.testing.assert_close(sim(recorded()["input"]), wanted, rtol=0, atol=step * 1e-3)
