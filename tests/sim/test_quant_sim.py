"""QuantSim: off it is the model, on it is the target; it behaves as any nn.Module; bad input gets a sentence."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import qlab
from qlab.errors import InputError, NonFiniteData, NotCalibrated, SpecError, UnknownLayer
from qlab.quantization import fake_quantize
from tests.graph.models import MODELS, Functional, Shared, TwoInputs, residual


def simulate(name: str = "residual", preset=None) -> tuple[nn.Module, qlab.QuantSim, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().eval(), torch.randn(6, *shape)
    sim = qlab.QuantSim(model, x, preset)
    sim.calibrate([x[:3], x[3:]])
    return model, sim, x


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_switched_off_it_is_the_float_model_bit_for_bit(name):
    model, sim, x = simulate(name)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        want = pytree.tree_leaves(model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with sim.quantization_off():
        assert all(torch.equal(a, b) for a, b in zip(want, pytree.tree_leaves(sim(x)), strict=True))
    noise = [(a - b).norm() / a.norm() for a, b in zip(want, pytree.tree_leaves(sim(x)), strict=True)]
    assert all(0 < n < 0.2 for n in noise)


@torch.no_grad()
def test_it_computes_what_the_definition_says_layer_by_layer():
    model, sim, x = simulate()

    def rounded(value, name):
        return fake_quantize(value, sim[name].output.encoding)

    def weight(name):
        return fake_quantize(model.get_submodule(name).weight, sim[name].weight.encoding)

    block = model[1]
    y = rounded(x, "input")
    stem = rounded(nn.functional.conv2d(y, weight("0"), model[0].bias, padding=1), "0")
    y = rounded(torch.relu(block.bn1(nn.functional.conv2d(stem, weight("1.conv1"), padding=1))), "1.relu")
    y = rounded(block.bn2(nn.functional.conv2d(y, weight("1.conv2"), padding=1)), "1.bn2")
    y = rounded(torch.relu(y + stem), "1.relu@1")
    y = rounded(model[3](model[2](y)), "3").flatten(1)
    y = rounded(nn.functional.linear(y, weight("5"), model[5].bias), "5")
    assert torch.equal(sim(x), y)


@torch.no_grad()
def test_every_quantizer_can_be_switched_off_alone():
    model, sim, x = simulate()
    for quantizer in sim.quantizers.values():
        quantizer.enabled = False
    assert torch.equal(sim(x), model(x))


def test_coverage_leaves_no_step_out():
    for name in MODELS:
        _, sim, _ = simulate(name)
        coverage = sim.coverage()
        producing = [layer.name for layer in sim.graph if layer.dtype is not None]
        assert set(producing) <= set(coverage["layer"])
        unexplained = coverage[(coverage["role"] == "float") & (coverage["reason"] == "")]
        assert unexplained.empty, unexplained


def test_functions_are_quantized_and_grid_preserving_steps_inherit():
    _, sim, _ = simulate("functional")
    roles = {name: layer.role.value for name, layer in sim.layers.items()}
    assert roles["hardswish"] == "quantized"
    assert roles["layer_norm"] == "quantized"
    assert roles["einsum"] == "quantized"
    assert roles["position"] == "quantized"
    assert roles["relu"] == "quantized"
    assert roles["conv"] == "fused"
    assert sim["linear"].weight is not None
    assert float(sim["softmax"].output.encoding.maximum) == pytest.approx(1.0)


def test_the_inputs_of_a_concatenation_share_one_grid():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return torch.cat([torch.relu(self.a(x)), 5 * torch.sigmoid(self.b(x)) - 9], 1)

    x = torch.randn(2, 3, 4, 4)
    sim = qlab.QuantSim(Cat(), x)
    sim.calibrate([x])
    assert sim["relu"].output is sim["sub"].output
    assert sim["cat"].role.value == "inherits"
    assert float(sim["relu"].output.encoding.minimum) < -3


@torch.no_grad()
def test_a_shared_module_and_a_tied_weight_have_one_weight_quantizer():
    model = Shared().eval()
    tokens = torch.randint(0, 20, (4, 6))
    sim = qlab.QuantSim(model, tokens)
    sim.calibrate([tokens])
    assert sim["layer"].weight is sim["layer@1"].weight
    assert sim["head"].weight is sim["embedding"].weight
    assert sim["layer"].output is not sim["layer@1"].output
    assert sim(tokens).shape == (4, 6, 20)


@torch.no_grad()
def test_deepcopy_state_dict_and_files_reproduce_the_sim(tmp_path):
    model, sim, x = simulate(preset=qlab.presets.w4a8(per_channel=True))
    sim["1.conv1"].weight.granularity = "per_block(4)"
    sim["1.relu"].output.rule = "mse"
    sim["5"].output.enabled = False
    want = sim(x)
    twin = copy.deepcopy(sim)
    assert torch.equal(twin(x), want)
    twin["1.conv2"].weight.bits = 2
    assert torch.equal(sim(x), want)
    assert not torch.equal(twin(x), want)
    sim.save(tmp_path / "sim.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["sim.safetensors"]
    loaded = qlab.load(tmp_path / "sim.safetensors", model, x)
    assert torch.equal(loaded(x), want)
    loaded["1.relu"].output.rule = "entropy"
    sim["1.relu"].output.rule = "entropy"
    assert torch.equal(loaded(x), sim(x))
    fresh = qlab.QuantSim(model, x, qlab.presets.w4a8(per_channel=True))
    fresh["1.conv1"].weight.granularity = "per_block(4)"
    fresh["5"].output.enabled = False
    sim["1.relu"].output.rule = "mse"
    fresh.load_state_dict(sim.state_dict())
    assert torch.equal(fresh(x), want)


def test_files_of_other_models_and_damaged_files_are_refused(tmp_path):
    _, sim, x = simulate()
    path = tmp_path / "sim.safetensors"
    sim.save(path)
    with pytest.raises(InputError, match="another model"):
        qlab.load(path, Functional().eval(), torch.randn(2, 3, 6, 6))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="not a readable sim file"):
        qlab.load(path, residual(), x)


def test_training_reaches_every_weight_and_moves_batch_norm():
    _, sim, x = simulate()
    sim.train()
    mean = sim.model[1].bn1.running_mean.clone()
    sim(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in sim.named_parameters() if "weight" in n)
    assert not torch.equal(mean, sim.model[1].bn1.running_mean)


@torch.no_grad()
def test_changing_a_setting_later_equals_asking_for_it_first():
    _, sim, x = simulate()
    sim.configure("*", weight={"bits": 4, "granularity": "per_channel"}, output={"bits": 6, "rule": "sqnr"})
    preset = qlab.presets.w8a8()
    asked = replace(
        preset,
        weight=replace(preset.weight, bits=4, granularity="per_channel"),
        output=replace(preset.output, bits=6, rule="sqnr"),
    )
    _, direct, _ = simulate(preset=asked)
    # Calibration sees quantized weights, so ranges agree closely, not exactly, when weight bits change afterwards.
    difference = (sim(x) - direct(x)).norm() / direct(x).norm()
    assert difference < 0.05
    sim.calibrate([x[:3], x[3:]])
    assert torch.equal(sim(x), direct(x))


def test_configure_refuses_as_a_whole():
    _, sim, _ = simulate()
    with pytest.raises(SpecError):
        sim.configure("*", weight={"bits": 4}, output={"bits": 99})
    assert {q.bits for q in sim.quantizers.values()} == {8}
    with pytest.raises(UnknownLayer, match="matches no layer"):
        sim.configure("layer9.*", weight={"bits": 4})


def test_a_name_of_a_preset_is_no_preset():
    with pytest.raises(SpecError, match=r"such as qlab.presets.w8a8\(\); got 'w8a8'"):
        simulate(preset="w8a8")


def test_skip_keeps_layers_in_float_and_must_match_something():
    model, x = residual().eval(), torch.randn(2, 3, 12, 12)
    sim = qlab.QuantSim(model, x, qlab.presets.w8a8(skip=["5", "1.conv*"]))
    assert sim["5"].weight is None
    assert sim["5"].output is None
    with pytest.raises(UnknownLayer, match="skip"):
        qlab.QuantSim(model, x, qlab.presets.w8a8(skip=["conv9"]))


def test_bad_calibration_data_names_batch_and_layer_and_changes_nothing():
    _, sim, x = simulate()
    before = sim.output(x)
    bad = x.clone()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteData, match=r"batch 1.*the data itself"):
        sim.calibrate([x, bad])
    with pytest.raises(InputError, match="at least one batch"):
        sim.calibrate([])
    with pytest.raises(InputError, match="must have shape"):
        sim.calibrate([torch.randn(2, 3, 5, 5)])
    assert torch.equal(sim.output(x), before)
    huge = residual().eval()
    with torch.no_grad():
        huge[1].bn1.weight.fill_(float("inf"))
    broken = qlab.QuantSim(huge, x)
    with pytest.raises(NonFiniteData, match=r"batch 0.*layer '1\.relu'"):
        broken.calibrate([x])


def test_an_uncalibrated_sim_says_what_to_run():
    sim = qlab.QuantSim(residual().eval(), torch.randn(2, 3, 12, 12))
    with pytest.raises(NotCalibrated, match=r"sim\.calibrate"):
        sim(torch.randn(2, 3, 12, 12))


def test_calibration_takes_what_users_have():
    model, x, y = TwoInputs().eval(), torch.randn(4, 4), torch.randn(4, 6)
    encodings = []
    for batches in ([(x, y)], [(x, y, torch.zeros(4))], [{"x": x, "y": y, "labels": torch.zeros(4)}], iter([(x, y)])):
        sim = qlab.QuantSim(model, (x, y))
        sim.calibrate(batches)
        encodings.append(sim["b"].output.encoding)
    assert all(encoding.equals(encodings[0]) for encoding in encodings)


def test_the_text_and_the_html_table_escape_names():
    model = nn.Sequential()
    model.add_module("<img src=x onerror=alert(1)>", nn.Linear(4, 4))
    sim = qlab.QuantSim(model, torch.randn(2, 4))
    assert "<img" in repr(sim)
    assert "<img" not in sim._repr_html_()
    assert "&lt;img" in sim._repr_html_()


@torch.no_grad()
def test_int32_biases_lie_on_the_grid_of_input_times_weight():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval(),
        torch.randn(8, 3, 6, 6),
    )
    sim = qlab.QuantSim(model, x, qlab.presets.w8a8(per_channel=True, int32_bias=True))
    sim.calibrate([x])
    fc, grid = sim["3"], sim["1"].output.encoding
    scale = grid.scale.double() * fc.weight.encoding.scale.double()
    bias = (model[3].bias.double() / scale).round() * scale
    hidden = sim["1"].output(torch.relu(_conv(sim, model, x))).flatten(1)
    want = fake_quantize(hidden @ fc.weight.quantized().T + bias.float(), fc.output.encoding)
    assert torch.allclose(sim(x), want, atol=1e-6)


def _conv(sim, model, x):
    encoding = sim["0"].weight.encoding
    scale = sim["input"].output.encoding.scale.double() * encoding.scale.double()
    bias = ((model[0].bias.double() / scale).round() * scale).float()
    return nn.functional.conv2d(sim["input"].output(x), sim["0"].weight.quantized(), bias)


@torch.no_grad()
def test_replaying_an_edit_of_the_sim_equals_a_full_run():
    from qlab.graph import Replay

    _, sim, x = simulate()
    replay = Replay(sim.graph, [[x]], sim.call, sim.fingerprint)
    replay.outputs()
    for edit in (
        lambda: sim.configure("1.*", weight={"bits": 3}),
        lambda: sim.configure("5", output={"enabled": False}),
        lambda: sim.model[1].conv2.weight.mul_(1.5),
        lambda: sim["5"].weight.set_bias_correction(torch.ones(5)),
        lambda: sim["1.relu"].output.set_range(0, 1),
    ):
        edit()
        assert torch.equal(replay.outputs()[0], sim(x))
