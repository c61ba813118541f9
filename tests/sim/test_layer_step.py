"""What a step leaves out and what it overwrites, against the same layers computed one by one."""

import pytest
import torch
from torch import nn

import qlab


def copying(activation: nn.Module) -> nn.Sequential:
    linear = nn.Linear(1, 1, bias=False)
    nn.init.ones_(linear.weight)
    return nn.Sequential(linear, activation)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("top", [0.9, 5.0, 5.99, 6.0, 6.02, 9.0])
def test_a_clamp_is_left_out_only_where_rounding_does_the_same(activation, top):
    model = copying(activation)
    x = torch.cat([torch.linspace(-2, 12, 5001), torch.tensor([0.0, -0.0, 6.0, 1e30, -1e30])]).reshape(-1, 1)
    sim = qlab.QuantSim(model, x, qlab.presets.w8a8())
    sim.calibrate([x.clamp(max=20)])
    sim.configure("*", weight={"enabled": False}, output={"enabled": False})
    grid = sim["1"].output
    grid.enabled = True
    grid.set_range(0.0, top)
    scale = grid.encoding.scale

    called = []
    sim.model[1].register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        found = sim(x)
    wide = activation(x.double())
    expected = (wide.float() / scale).round().clamp(0, 255) * scale
    assert torch.equal(found, expected)
    is_relu6 = isinstance(activation, nn.ReLU6)
    assert bool(called) == (is_relu6 and 6.0 / float(scale) < 254.75)


def test_a_clamp_stays_where_the_grid_goes_below_zero():
    model = copying(nn.ReLU())
    x = torch.linspace(-2, 3, 101).reshape(-1, 1)
    sim = qlab.QuantSim(model, x)
    sim.calibrate([x])
    sim["1"].output.set_range(-1.0, 3.0)
    with torch.no_grad():
        assert float(sim(x).min()) == 0.0


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.second, self.norm2, self.relu6 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU6()

    def forward(self, x):
        y = self.norm(self.conv(x))
        z = self.norm2(self.second(self.relu(y)))
        return y + self.relu6(z), torch.relu(z.flatten(1) + 1)


@pytest.mark.parametrize("folded", [False, True])
def test_overwriting_what_dies_changes_no_bit_and_no_value_that_is_still_needed(folded):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    sim = qlab.QuantSim(Branches(), x)
    if folded:
        qlab.BatchNormFolding().apply(sim)
    sim.calibrate([x])
    kept = x.clone()
    with torch.no_grad():
        expected = sim.graph.run([x], sim.call)  # changes no argument
        found = sim(x)
    assert torch.equal(x, kept)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_a_hook_has_seen_is_not_overwritten():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    sim = qlab.QuantSim(model, x)
    sim.calibrate([x])
    with torch.no_grad():
        unhooked = sim(x)
    seen = []
    sim.model[1].register_forward_hook(lambda module, args, value: seen.extend([value, value.clone()]))
    with torch.no_grad():
        assert torch.equal(sim(x), unhooked)
    assert float(seen[0].min()) < 0
    assert torch.equal(*seen)
