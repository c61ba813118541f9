"""The estimate against exact values: equal where the model is linear, of the same order on trained networks."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.analysis import estimate_sensitivity
from qlab.examples import digits, mobilenet, resnet, vit
from tests.analysis.small import calibrated, data


def exact(sim, row, batches, bits=None):
    """(mean squared change, mean KL) of the result with the quantizer of one row alone switched on."""
    twin = copy.deepcopy(sim)
    own = getattr(twin[row.layer], row.part)
    for quantizer in twin.quantizers.values():
        quantizer.enabled = quantizer is own
    if bits is not None:
        own.bits = bits
    outputs = [(sim.float_output(batch), twin.output(batch)) for batch in batches]
    y, q = (torch.cat(side).double() for side in zip(*outputs, strict=True))
    kl = (y.softmax(-1) * (y.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    return float((y - q).square().mean()), float(kl)


def test_in_a_linear_model_the_estimated_error_is_the_true_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.Flatten(), nn.Linear(96, 4))
    x = torch.randn(512, 2, 6, 6)
    sim = qlab.QuantSim(model, x[:8], qlab.presets.w4a8())
    sim.calibrate([x])
    table = estimate_sensitivity(sim, [x], bits=(3,), probes=8)
    for row in table[table.granularity == "per_tensor"].itertuples():
        mse, _ = exact(sim, row, [x], row.bits)
        spread = math.sqrt(2 / (512 * 8))  # of a mean of squares of so many random directions
        assert row.mse == pytest.approx(mse, rel=4 * spread + 0.02), row.layer


def test_small_changes_cost_what_was_estimated():
    sim, batches = calibrated(qlab.presets.w8a8()), data(batches=12, size=64)
    table = estimate_sensitivity(sim, batches, bits=(), probes=8)
    assert table.is_set.all()
    for row in table.itertuples():
        mse, kl = exact(sim, row, batches)
        assert row.mse == pytest.approx(mse, rel=0.3), row.layer
        assert row.kl == pytest.approx(kl, rel=0.4), row.layer
        assert row.kl_error < row.kl


def test_a_channel_of_its_own_scale_costs_less_and_fewer_bits_cost_more():
    sim = calibrated()
    table = estimate_sensitivity(sim, data(), bits=(3, 6), probes=4)
    weights = table[(table.part == "weight") & ~table.is_set]
    assert set(weights.granularity) == {"per_tensor", "per_channel"}
    for _, rows in weights.groupby(["layer", "granularity"]):
        assert rows.sort_values("bits").mse.is_monotonic_decreasing
    wide = weights[weights.layer == "stem.0"].set_index(["bits", "granularity"]).mse
    assert wide[3, "per_channel"] < wide[3, "per_tensor"]


class Tokens(nn.Module):
    """An embedding, a position parameter without a sample axis, and a function with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.weight = nn.Parameter(torch.randn(7, 6))

    def forward(self, codes: Tensor) -> Tensor:
        return nn.functional.linear(self.embedding(codes) + self.position, self.weight)


def test_embeddings_parameters_and_functions_are_estimated_as_well():
    torch.manual_seed(0)
    codes = torch.randint(11, (256, 5))
    sim = qlab.QuantSim(Tokens(), codes[:4], qlab.presets.w4a8())
    sim.calibrate([codes])
    table = estimate_sensitivity(sim, list(codes.split(8)), bits=(), probes=16)
    assert {"embedding", "position", "linear"} <= set(table.layer)
    for row in table.itertuples():
        mse, _ = exact(sim, row, [codes])
        assert row.mse == pytest.approx(mse, rel=0.35), (row.layer, row.part)


def test_it_is_deterministic_and_does_not_depend_on_the_memory_that_it_has():
    sim = calibrated()
    first, again = (estimate_sensitivity(sim, data(), seed=3) for _ in range(2))
    assert first.equals(again)
    assert not first.equals(estimate_sensitivity(sim, data(), seed=4))
    small = estimate_sensitivity(sim, data(), seed=3, probes=8, max_bytes=200_000)
    assert (small.sqnr - estimate_sensitivity(sim, data(), seed=3, probes=8).sqnr).abs().max() < 3


@pytest.mark.parametrize("network", [mobilenet, resnet, vit])
@pytest.mark.parametrize("per_channel", [False, True])
def test_on_the_digits_networks_the_estimate_ranks_layers_as_they_are_at_four_bits(network, per_channel):
    found = digits()
    sim = qlab.QuantSim(network(), found.test_images[:2], qlab.presets.w8a8(per_channel=per_channel))
    sim.calibrate(found.calibration(4))
    settings = {"bits": 4, "disabled": False, "estimate_bits": 4}
    analysis = qlab.QuantAnalyzer(**settings).measure(sim, found.calibration(4), qlab.SQNR(found.test[:2]))
    table = analysis.correlation.set_index(["estimate", "measured"]).spearman
    assert table["sqnr", "sqnr"] >= 0.9  # on other images than those of the estimate


@pytest.mark.parametrize("network", [mobilenet, resnet])
def test_on_the_images_that_it_saw_it_ranks_layers_by_kl_and_by_noise(network):
    found = digits()
    sim = qlab.QuantSim(network(), found.test_images[:2])
    sim.calibrate(found.calibration(4))
    seen = found.test[:8]
    settings = {"bits": 4, "disabled": False, "summary": False, "estimate_bits": 4}
    analysis = qlab.QuantAnalyzer(**settings).measure(sim, seen, qlab.SQNR(seen))
    table = analysis.correlation.set_index(["estimate", "measured"]).spearman
    assert table["kl", "kl"] >= 0.9
    assert table["sqnr", "sqnr"] >= 0.9
