"""A snapshot brings back the sim bit for bit, whatever was done to it."""

import pytest
import torch
from torch import nn

import qlab
from tests.graph.models import residual


def make() -> tuple[qlab.QuantSim, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    sim = qlab.QuantSim(residual().eval(), x)
    sim.calibrate([x])
    return sim, x


def _fold_by_hand(sim: qlab.QuantSim) -> None:
    sim.graph.replace_module("1.bn1", "identity")
    conv = sim.graph["1.conv1"].module
    conv.register_parameter("bias", nn.Parameter(torch.ones(8)))
    sim.changed()


CHANGES = {
    "weights": lambda sim: sim.model[0].weight.data.mul_(2),
    "settings": lambda sim: sim.configure("*", weight={"bits": 3}, output={"enabled": False}),
    "calibration": lambda sim: sim.calibrate([torch.randn(4, 3, 12, 12) * 9]),
    "rounding": lambda sim: sim["5"].weight.set_rounding(torch.zeros(5, 8)),
    "bias correction": lambda sim: sim["5"].weight.set_bias_correction(torch.ones(5)),
    "folding": _fold_by_hand,
    "training": lambda sim: sim.train() and sim(torch.randn(4, 3, 12, 12)),
    "range": lambda sim: sim["1.relu"].output.set_range(0, 0.1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_restore_brings_everything_back(name):
    sim, x = make()
    want, tensors, table = sim.output(x), {k: v.clone() for k, v in sim.state_dict().items()}, sim.to_pandas()
    snapshot = qlab.Snapshot(sim)
    CHANGES[name](sim)
    snapshot.restore()
    assert torch.equal(sim.output(x), want)
    assert sim.state_dict().keys() == tensors.keys()
    assert all(torch.equal(v, tensors[k]) for k, v in sim.state_dict().items())
    assert sim.to_pandas().equals(table)
    assert not sim.training
    assert sim.graph.edits == []


def test_a_rounding_in_force_is_in_force_again_and_may_be_restored_twice():
    sim, x = make()
    sim["5"].weight.set_rounding(torch.ones(5, 8))
    want, snapshot = sim.output(x), qlab.Snapshot(sim)
    for _ in range(2):
        sim["5"].weight.bits = 4
        sim.model[5].weight.data.mul_(3)
        snapshot.restore()
        assert torch.equal(sim.output(x), want)
        assert sim["5"].weight.rounding is not None


def test_without_weights_only_settings_come_back():
    sim, _ = make()
    snapshot = qlab.Snapshot(sim, weights=False)
    assert snapshot.bytes == 0
    sim.configure("*", weight={"bits": 3})
    snapshot.restore()
    assert {q.bits for q in sim.quantizers.values()} == {8}
