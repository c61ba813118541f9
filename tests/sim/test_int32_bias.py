"""With int32 biases, layers that no integer kernel computes hold their bias as the target does: against float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import qlab

LAYERS = {
    "linear": (nn.Linear(5, 4), (5,)),
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "depthwise": (nn.Conv1d(3, 6, 2, groups=3), (3, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), (4, 3, 3)),
    "transposed in groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 3, 3)),
    "transposed depthwise": (nn.ConvTranspose1d(3, 6, 3, groups=3), (3, 4)),
}


def make(name: str, per_channel: bool, **fields) -> tuple[qlab.QuantSim, torch.Tensor]:
    module, shape = LAYERS[name]
    preset = qlab.presets.w4a8(per_channel=per_channel, int32_bias=True)  # 4 bits: computed in float
    x = torch.randn(8, *shape)
    sim = qlab.QuantSim(nn.Sequential(module), x, replace(preset, **fields))
    sim.calibrate([x])
    return sim, x


def channel_scales(sim: qlab.QuantSim) -> torch.Tensor:
    """The weight's scale of each output channel, read off a quantized weight of ones: no layout is assumed."""
    quantizer, module = sim["0"].weight, sim.model[0]
    scale, _ = quantizer.required_encoding().broadcast(module.weight.shape)
    scale = scale.expand(module.weight.shape).double()
    if not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return scale.flatten(1)[:, 0]
    inputs, outputs = scale.shape[0] // module.groups, scale.shape[1]
    return scale.reshape(module.groups, inputs, outputs, -1)[:, 0, :, 0].reshape(-1)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_bias_lies_on_the_grid_of_input_times_weight(name, per_channel):
    sim, x = make(name, per_channel)
    bias = sim.model[0].bias.detach().double()
    scale = (sim["input"].output.encoding.scale * channel_scales(sim).float()).double()  # the target stores float32
    wanted = torch.round(bias / scale) * scale
    sim.configure("*", output={"enabled": True})
    zero = torch.zeros_like(x)  # of a zero input only the bias is left
    with torch.no_grad():
        have = sim.compute(sim.graph["0"], (zero,), {})
    have = have.movedim(1, -1).reshape(-1, len(bias)).double()
    middle = have[0]
    assert torch.allclose(middle, wanted, rtol=1e-7, atol=0)
    assert not torch.equal(wanted.float(), bias.float())


def test_a_correction_is_part_of_the_bias_that_is_rounded():
    sim, x = make("linear", False)
    sim["0"].weight.set_bias_correction(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    bias = sim.model[0].bias.detach().double() + torch.tensor([0.1, -0.2, 0.3, 0.0]).double()
    scale = (sim["input"].output.encoding.scale * sim["0"].weight.encoding.scale).double()
    with torch.no_grad():
        have = sim.compute(sim.graph["0"], (torch.zeros_like(x),), {})[0]
    assert torch.allclose(have.double(), torch.round(bias / scale) * scale, rtol=1e-6)


def test_a_bias_that_has_no_place_in_32_bits_stays_float():
    sim, x = make("convolution", True)
    with torch.no_grad():
        sim.model[0].weight[2] = 1e-9  # a dead channel: its scale is the smallest there is
        sim.model[0].bias[2] = 3.7e3
        assert sim.bias_scale(sim.graph["0"]) is None
        have = sim.compute(sim.graph["0"], (torch.zeros_like(x),), {})
    assert torch.equal(have[0, :, 0, 0], sim.model[0].bias)


def test_without_the_option_or_with_a_float_input_the_bias_stays_float():
    for fields in ({"int32_bias": False}, {"quantize_inputs": False}):
        sim, x = make("linear", False, **fields)
        with torch.no_grad():
            assert torch.equal(sim.compute(sim.graph["0"], (torch.zeros_like(x),), {})[0], sim.model[0].bias)


def test_the_gradient_passes_the_rounding():
    sim, x = make("linear", True)
    sim.train()
    sim(x).sum().backward()
    assert sim.model[0].bias.grad.abs().sum() > 0
