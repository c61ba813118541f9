"""SequentialMSE: of the ranges tried, the one with the least error of the outputs, as a loop over them finds it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import qlab
from qlab.errors import InputError
from tests.techniques.models import NETWORKS, lived
from tests.techniques.rounding import correlated, on_grid, two_layers, weights


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_the_scale_is_the_best_candidate_of_a_plain_loop(granularity):
    sim, batches = two_layers()
    sim.configure("*", weight={"granularity": granularity})
    with torch.no_grad():
        sim.model[0].weight[:, 2] *= 6  # one long column: narrower ranges pay
    sim.calibrate(batches)
    x, weight = torch.cat(batches), sim.model[0].weight.clone()
    xh, exact = sim["input"].output(x), functional.linear(x, weight)
    start = sim["0"].weight.required_encoding().scale.clone()
    errors = []
    for i in reversed(range(20)):
        scale = (start * (i + 1) / 20).view(-1, 1)
        rounded = (weight / scale).round().clamp(-8, 7) * scale
        errors.append((functional.linear(xh, rounded) - exact).double().square().mean(0))
    table = torch.stack(errors)  # [candidates, outputs]
    best = table.sum(1, keepdim=True).argmin(0) if granularity == "per_tensor" else table.argmin(0)
    qlab.SequentialMSE().apply(sim, batches)
    found = sim["0"].weight.required_encoding().scale
    torch.testing.assert_close(found.flatten(), start.flatten() * (20 - best) / 20)
    assert bool((best > 0).any())
    assert sim["0"].weight.rounding is None
    assert sim["0"].weight.frozen


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_of_any_kind_is_worse_and_grids_stay_whole(name):
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    batches = [correlated(16, *size, seed=seed) for seed in range(2)]
    sim = qlab.QuantSim(lived(build()), batches[0], qlab.presets.w4a8())
    sim.configure("*", weight={"bits": 3})
    sim.calibrate(batches)
    report = qlab.SequentialMSE().apply(sim, batches)
    assert all(row["sqnr_after"] >= row["sqnr_before"] - 1e-3 for row in report.rows)
    assert any(row["scale"] < 0.95 for row in report.rows)
    assert all(on_grid(weight) for weight in weights(sim).values())


def test_blocks_take_one_factor_a_channel():
    sim, batches = two_layers()
    sim.configure("0", weight={"granularity": "per_block(4)", "bits": 2})
    start = sim["0"].weight.required_encoding().scale.clone()
    qlab.SequentialMSE(layers="0").apply(sim, batches)
    factors = sim["0"].weight.required_encoding().scale / start
    assert tuple(factors.shape) == (8, 3)
    torch.testing.assert_close(factors, factors[:, :1].expand(8, 3))
    assert float(factors.min()) < 1


def test_ranges_hold_through_calibration_and_rounding_comes_on_top():
    sim, batches = two_layers()
    sim.configure("*", weight={"bits": 2})
    noise = qlab.SQNR(batches)
    before = sim.evaluate(noise)
    qlab.SequentialMSE().apply(sim, batches)
    scale, ranged = sim["0"].weight.required_encoding().scale.clone(), sim.evaluate(noise)
    assert ranged > before
    sim.calibrate(batches)
    assert torch.equal(sim["0"].weight.required_encoding().scale, scale)
    qlab.AdaRound().apply(sim, batches)
    assert torch.equal(sim["0"].weight.required_encoding().scale, scale)
    assert sim.evaluate(noise) > ranged


def test_frozen_ranges_and_other_layers_are_left_alone():
    sim, batches = two_layers()
    sim.configure("*", weight={"bits": 2})
    sim["0"].weight.freeze()
    before = {name: weight.required_encoding().scale.clone() for name, weight in weights(sim).items()}
    report = qlab.SequentialMSE(layers="0").apply(sim, batches)
    assert [row["form"] for row in report.rows] == ["frozen: kept"]
    assert all(torch.equal(weight.required_encoding().scale, before[name]) for name, weight in weights(sim).items())
    assert not sim["2"].weight.frozen


@pytest.mark.parametrize("bits", [2, 16])
def test_zero_weights_dead_inputs_and_extreme_bits(bits):
    sim, batches = two_layers(qlab.presets.w8a16())
    sim.configure("*", weight={"bits": bits})
    batches = [x.clone() for x in batches]
    for x in batches:
        x[:, :4] = 0
    with torch.no_grad():
        sim.model[2].weight.zero_()
    sim.calibrate(batches)
    scale = sim["2"].weight.required_encoding().scale.clone()
    report = qlab.SequentialMSE().apply(sim, batches)
    assert torch.equal(sim["2"].weight.required_encoding().scale, scale)
    assert not sim["2"].weight.quantized().any()
    assert report.rows[0]["scale"] == 1 if bits == 16 else report.rows[0]["scale"] < 1


def test_without_data_or_a_layer_to_change_it_says_so():
    sim, batches = two_layers()
    with pytest.raises(InputError, match="SequentialMSE needs data"):
        qlab.SequentialMSE().apply(sim)
    with pytest.raises(InputError, match="no batch reaches layer '0'"):
        qlab.SequentialMSE().apply(sim, [])
    off = copy.deepcopy(sim)
    off.configure("0", weight={"enabled": False})
    report = qlab.SequentialMSE().apply(off, batches)
    assert [row["layer"] for row in report.rows] == ["2"]
    assert any("not quantized: 0" in note for note in report.notes)
    bare = qlab.QuantSim(nn.Sequential(nn.ReLU()), torch.randn(2, 3))
    assert "no layer" in qlab.SequentialMSE().apply(bare, [torch.randn(2, 3)]).summary
