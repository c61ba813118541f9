"""A clamp before a grid that clamps as well."""

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
