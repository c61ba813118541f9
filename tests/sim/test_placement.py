"""Masks stay masks, constants and integers keep their precision, and weights are weights however they are written."""

import math

import pytest
import torch
from torch import nn

import qlab
from tests.graph.test_origins import Masked, Packed, Positions


@pytest.mark.parametrize("hide", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_masked_places_stay_masked_though_calibration_never_saw_one(hide):
    torch.manual_seed(0)
    model = Masked(hide).eval()
    sim = qlab.QuantSim(model, torch.randint(1, 9, (2, 3)))
    sim.calibrate([torch.randint(1, 9, (8, 3))])
    tokens = torch.tensor([[1, 2, 0], [3, 0, 0]])
    with torch.no_grad():
        assert not sim(tokens)[(tokens == 0)[:, None].expand(2, 3, 3)].any()
        assert (sim(tokens) - model(tokens)).abs().max() < 0.05
    assert sim["add"].role.value == "inherits"
    assert sim["add"].output is sim["matmul"].output
    assert sim["masked_fill"].reason == "an attention mask, not a value"


def test_angles_of_time_steps_keep_their_precision_and_the_embedding_has_a_grid():
    model = Positions().eval()
    steps = torch.tensor([3, 700, 12, 999])
    sim = qlab.QuantSim(model, steps)
    sim.calibrate([steps])
    assert sim["mul"].role.value == "float"
    assert "integers" in sim["mul"].reason
    assert "constants" in sim["exp"].reason
    assert sim["cat"].role.value == "quantized"
    with torch.no_grad():
        assert (sim(steps) - model(steps)).norm() / model(steps).norm() < 0.03


def test_a_weight_behind_a_view_gets_a_weight_quantizer_and_its_bias_stays_float():
    torch.manual_seed(0)
    model, x = Packed().eval(), torch.randn(8, 4)
    preset = qlab.presets.w4a8(per_channel=True)
    sim = qlab.QuantSim(model, x, preset)
    sim.calibrate([x])
    assert sim["linear"].weight is sim["linear_1"].weight
    assert sim["linear"].weight.bits == 4
    assert sim["linear"].weight.encoding.scale.shape == (6,)
    assert sim["matmul"].weight.encoding.scale.shape == (5,)
    assert sim["bias"].role.value == "float"
    assert sim["t"].role.value == "fused"
    for quantizer in sim.quantizers.values():
        quantizer.enabled = isinstance(quantizer, qlab.quantization.WeightQuantizer)
    with torch.no_grad():
        model.packed.copy_(sim["linear"].weight.quantized())
        model.table.copy_(sim["matmul"].weight.quantized())
        torch.testing.assert_close(sim(x), model(x))


def test_a_choice_between_two_grids_has_a_grid_of_its_own():
    class Choice(nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x, torch.sin(7 * x))

    x = torch.randn(16, 5)
    sim = qlab.QuantSim(Choice(), x)
    sim.calibrate([x])
    assert sim["where"].role.value == "quantized"


def test_recurrent_weights_say_why_they_stay_float():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    sim = qlab.QuantSim(Model(), torch.randn(3, 2, 4))
    assert "recurrent" in sim["lstm.weight_ih_l0"].reason
