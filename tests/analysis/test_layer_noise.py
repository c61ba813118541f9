"""Noise of layers against values picked out of two runs by hand."""

import math

import pytest
import torch
from torch import nn

import qlab
from qlab.analysis import layer_noise
from qlab.graph import call_layer
from tests.analysis.small import calibrated, data


def values(sim, batch, call):
    seen = {}

    def record(layer, args, kwargs):
        seen[layer.name] = call(layer, args, kwargs)
        return seen[layer.name]

    with torch.no_grad():
        sim.graph.run(sim.inputs(batch), record)
    return seen


def test_noise_is_that_of_the_values_in_two_runs():
    sim, batches = calibrated(), data()
    table = layer_noise(sim, batches).set_index("layer")
    pairs = [(values(sim, batch, call_layer), values(sim, batch, sim.call)) for batch in batches]
    assert set(table.index) == {name for name, entry in sim.placed.items() if entry.role is qlab.sim.Role.QUANTIZED}
    for name, row in table.iterrows():
        y = torch.cat([a[name].double() for a, _ in pairs])
        q = torch.cat([b[name].double() for _, b in pairs])
        assert row.mse == pytest.approx(float((y - q).square().mean()), rel=1e-6)
        assert row.sqnr == pytest.approx(10 * math.log10(float(y.square().sum() / (y - q).square().sum())), abs=1e-6)


def test_own_noise_is_what_remains_with_all_else_in_float_and_the_inputs_of_the_sim():
    sim, batch = calibrated(), data()[0]
    own = layer_noise(sim, [batch]).set_index("layer").own_mse
    seen = values(sim, batch, sim.call)
    block = sim.model.stem
    with torch.no_grad():
        stem = block[2](block[1](block[0](seen["x"])))
        left = sim.model.left(seen["relu"])
        head = sim.model.head(seen["mean"])
    for name, wanted in (("stem.2", stem), ("left", left), ("head", head), ("x", batch[0])):
        assert own[name] == pytest.approx(float((seen[name] - wanted).double().square().mean()), rel=1e-6)


def test_a_sim_in_float_has_no_noise_and_is_left_alone():
    sim = calibrated()
    for quantizer in sim.quantizers.values():
        quantizer.enabled = False
    table = layer_noise(sim, data()[:1])
    assert (table.sqnr == math.inf).all()
    assert (table.own_mse == 0).all()
    assert table.sqnr_error.isna().all()


def test_the_error_shrinks_with_samples_as_it_should():
    torch.manual_seed(0)
    sim = qlab.QuantSim(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8))
    x = torch.randn(2000, 8)
    sim.calibrate([x])
    few, many = (layer_noise(sim, [part]).set_index("layer").sqnr_error["1"] for part in (x[:125], x))
    assert few / many == pytest.approx(4, rel=0.4)
