"""GPTQ on whole sims: the published algorithm's integers, grids as they are, moments shared with AdaRound."""

import copy

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.quantization import quantize
from tests.techniques.models import NETWORKS, lived
from tests.techniques.rounding import codes, correlated, equal, on_grid, two_layers, weights


def published(weight: Tensor, scale: float, x: Tensor, xh: Tensor, damping: float) -> Tensor:
    """GPTQ of arXiv:2210.17323 on the weight that fits the float outputs best, column by column, in float64."""
    weight, x, xh = weight.double(), x.double(), xh.double()
    metric = xh.t() @ xh / len(xh)
    ridge = damping * torch.diagonal(metric).mean() * torch.eye(len(metric), dtype=torch.float64)
    cross = weight @ (x.t() @ xh) / len(xh)
    metric = metric + ridge
    target = torch.linalg.solve(metric, (cross + weight @ ridge).t()).t()
    order = torch.diagonal(metric).argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(metric[order][:, order]), upper=True)
    rest, levels = target[:, order].clone(), torch.empty_like(target)
    for j in range(rest.shape[1]):
        levels[:, order[j]] = (rest[:, j] / scale).round().clamp(-8, 7)
        error = (rest[:, j] - levels[:, order[j]] * scale) / upper[j, j]
        rest[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return levels


def test_without_sweeps_the_integers_are_those_of_the_published_algorithm():
    sim, batches = two_layers()
    x = torch.cat(batches)
    scale = float(sim["0"].weight.required_encoding().scale)
    wanted = published(sim.model[0].weight.detach(), scale, x, sim["input"].output(x), 0.01)
    nearest = quantize(sim["0"].weight.weight, sim["0"].weight.required_encoding())
    qlab.GPTQ(sweeps=0).apply(sim, batches)
    assert int((wanted != nearest).sum()) > 10
    assert torch.equal(sim["0"].weight.rounding.double(), wanted)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block(2)"])
def test_scale_and_bias_stay_and_every_layer_gains(granularity):
    build, size = NETWORKS["images"]
    torch.manual_seed(0)
    batches = [correlated(16, *size, seed=seed) for seed in range(2)]
    sim = qlab.QuantSim(lived(build()), batches[0], qlab.presets.w4a8())
    for weight in weights(sim).values():
        odd = weight.weight.shape[1] % 2  # channels that blocks of two do not divide
        weight.granularity = "per_channel" if odd else granularity
    sim.calibrate(batches)
    scales = {name: weight.required_encoding().scale.clone() for name, weight in weights(sim).items()}
    report = qlab.GPTQ().apply(sim, batches)
    for name, weight in weights(sim).items():
        assert torch.equal(weight.required_encoding().scale, scales[name])
        assert weight.bias_correction is None
        assert on_grid(weight)
    assert all(row["sqnr_after"] > row["sqnr_before"] for row in report.rows)
    assert report.values["forms"] == {"columns": 6}


def test_sweeps_make_every_layer_at_least_as_good():
    gains = []
    for sweeps in (0, 1, 5):
        sim, batches = two_layers()
        gains.append(qlab.GPTQ(sweeps=sweeps, layers="0").apply(sim, batches).rows[0]["sqnr_after"])
    assert gains[0] <= gains[1] <= gains[2]
    assert gains[0] < gains[2]


def test_moments_serve_adaround_and_gptq_alike():
    sim, batches = two_layers()
    qlab.AdaRound().apply(sim, batches)
    sim.configure("*", weight={"bits": 5})
    fresh, _ = two_layers()
    fresh.configure("*", weight={"bits": 5})
    report = qlab.GPTQ().apply(sim)
    assert {row["form"] for row in report.rows} == {"columns"}
    qlab.GPTQ(layers="0").apply(fresh, batches)
    assert torch.equal(sim["0"].weight.rounding, fresh["0"].weight.rounding)


def test_the_same_data_give_the_same_integers():
    found = []
    for _ in range(2):
        sim, batches = two_layers()
        qlab.GPTQ().apply(sim, batches)
        found.append(codes(sim))
    assert equal(*found)


@pytest.mark.parametrize("bits", [2, 16])
def test_dead_inputs_zero_weights_and_extreme_bits(bits):
    sim, batches = two_layers(qlab.presets.w8a16())
    sim.configure("*", weight={"bits": bits})
    batches = [x.clone() for x in batches]
    for x in batches:
        x[:, :4] = 0
    with torch.no_grad():
        sim.model[2].weight.zero_()
    sim.calibrate(batches)
    qlab.GPTQ().apply(sim, batches)
    assert all(on_grid(weight) for weight in weights(sim).values())
    assert not sim["2"].weight.quantized().any()
    off = (sim["0"].weight.quantized() - sim["0"].weight.weight).detach()[:, :4].abs().max()
    assert float(off) <= 0.51 * float(sim["0"].weight.required_encoding().scale)  # nothing to make up for: to nearest


def test_without_data_and_with_none_that_reaches_a_layer_it_says_so():
    sim, batches = two_layers()
    before = copy.deepcopy(codes(sim))
    with pytest.raises(InputError, match="GPTQ needs data"):
        qlab.GPTQ().apply(sim)
    with pytest.raises(InputError, match="no batch reaches layer '0'"):
        qlab.GPTQ().apply(sim, [batches[0][:0]])
    assert codes(sim) == before
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    bare = qlab.QuantSim(model, torch.randn(2, 3, 4))
    report = qlab.GPTQ().apply(bare, [torch.randn(2, 3, 4)])
    assert report.summary == "no layer has a quantized weight that can be rounded"
