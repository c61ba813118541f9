"""The Q/DQ file and the float file, by ONNX Runtime: the same numbers, the same names, types that hold the grids."""

import copy
import functools
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import qlab
from tests.export.conftest import network, run_onnx, sim_of

PRESETS = {"w8a8": (8, 8), "w4a8": (4, 8), "w8a16": (8, 16), "w4a4": (4, 4), "onnxruntime": (8, 8)}  # bits


def power(x):
    return x.double().square().mean().item()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["mobilenet", "resnet", "encoder"])
def test_the_file_computes_what_the_sim_does(tmp_path, name, preset, per_channel):
    sim = sim_of(name, getattr(qlab.presets, preset)(per_channel=per_channel))
    weights = [layer.weight for layer in sim.layers.values() if layer.weight is not None]
    assert {(weight.bits, weight.encoding.scale.dim()) for weight in weights} == {(PRESETS[preset][0], per_channel)}
    sim.export(tmp_path / "m", formats=["onnx"])
    x = network(name).test[0][0][:32]
    ours, theirs = sim.output(x), run_onnx(tmp_path / "m.onnx", x, optimised=sim.preset.int32_bias)[0]
    assert power(ours - theirs) < 0.1 * power(ours - sim.float_output(x))
    grid = sim[sim.graph.outputs[0].name].output.encoding
    assert grid.bits == PRESETS[preset][1]
    if grid.bits <= 8:
        assert ((ours - theirs).abs() < grid.scale / 2).float().mean() > 0.9


class Mixed(nn.Module):
    """What exporters stumble on: a layer called twice, a tied weight, a transposed convolution, a concatenation."""

    def __init__(self):
        super().__init__()
        self.first, self.relu = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.twice, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.up(torch.cat([x, self.relu(self.depthwise(x))], dim=1))
        x = self.norm(self.twice(x.flatten(2).mean(1).unflatten(1, (-1, 8))) + self.shift)
        return torch.softmax(self.tied(self.twice(x)), -1)


@functools.cache
def captured():
    torch.manual_seed(0)
    return qlab.QuantSim(Mixed(), torch.randn(4, 2, 4, 4)), torch.randn(16, 2, 4, 4)


def mixed(weight=None, output=None):
    """A calibrated sim of Mixed with settings for all weights and outputs."""
    sim, x = copy.deepcopy(captured()[0]), captured()[1]
    sim.configure("*", weight=weight, output=output)
    sim.calibrate([x])
    return sim, x


SETTINGS = {
    "as it is": ({}, {}),
    "four bits in blocks": ({"bits": 4, "granularity": "per_block(4)"}, {}),
    "eight bits in blocks": ({"granularity": "per_block(2)"}, {"bits": 16}),
    "odd bits": ({"bits": 5, "granularity": "per_channel"}, {"bits": 6}),
    "strict": ({"scheme": "strict_symmetric"}, {"scheme": "strict_symmetric"}),
    "unsigned": ({"scheme": "asymmetric", "granularity": "per_channel"}, {"scheme": "unsigned_symmetric"}),
}


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("weights", ["float", "integer"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_grid_has_its_type_and_the_same_integers(tmp_path, settings, weights):
    weight, output = SETTINGS[settings]
    sim, x = mixed(weight, output)
    sim.export(tmp_path / "m", formats=["onnx"], weights=weights)
    ours, theirs = sim.output(x), run_onnx(tmp_path / "m.onnx", x)[0]
    step = sim["softmax"].output.encoding.scale
    assert ((ours - theirs).abs() < step / 2).float().mean() > (0.9 if output.get("bits") != 16 else 0)
    assert power(ours - theirs) < 0.1 * power(ours - sim.float_output(x))
    stored = integer_weights(tmp_path / "m.onnx")
    for name in ("first", "depthwise", "up", "twice"):
        quantizer = sim[name].weight
        codes = qlab.quantization.quantize(quantizer.weight.detach(), quantizer.encoding)
        assert np.array_equal(stored[f"{name}.weight"], codes.numpy()), name


def integer_weights(path):
    """The integers of each weight by name: as ONNX Runtime computes them, or as the file holds them."""
    model = onnx.load(path)
    names = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    constants = {i.name: numpy_helper.to_array(i).astype(np.int32) for i in model.graph.initializer}
    found = {name.removesuffix("_q"): value for name, value in constants.items() if name.endswith("weight_q")}
    wanted = [name for name in names if name.endswith("weight_q")]
    if wanted:
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
        onnx.save(model, path)
        values = onnx.reference.ReferenceEvaluator(model).run(wanted, {"x": np.zeros((2, 2, 4, 4), np.float32)})
        found |= {n.removesuffix("_q"): v.astype(np.int32) for n, v in zip(wanted, values, strict=True)}
    return found


def test_names_are_the_layers_names_in_all_files(tmp_path):
    sim, _ = mixed()
    sim.export(tmp_path / "m")
    quantized, floating = (tensors(onnx.load(tmp_path / f"m{suffix}")) for suffix in (".onnx", ".float.onnx"))
    listed = json.loads((tmp_path / "m.encodings").read_text())
    names = [entry["name"] for part in ("activation_encodings", "param_encodings") for entry in listed[part]]
    assert {"x", "relu", "relu@1", "up", "twice", "twice@1", "tied", "softmax", "first.weight"} <= set(names)
    assert not set(names) - quantized
    assert not set(names) - floating
    state = sim.model.state_dict()
    weights = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "m.float.onnx").graph.initializer}
    for name in ("first.weight", "depthwise.bias", "norm.weight", "shift"):
        assert np.array_equal(weights[name], state[name].numpy())


def tensors(model):
    found = {name for node in model.graph.node for name in (*node.input, *node.output)}
    return found | {i.name for i in model.graph.initializer}


@pytest.mark.usefixtures("traced_once")
def test_the_batch_is_free_and_the_models_are_well_formed(tmp_path):
    sim, x = mixed()
    sim.export(tmp_path / "m", formats=["onnx"])
    for suffix in (".onnx", ".float.onnx"):
        path = tmp_path / f"m{suffix}"
        onnx.checker.check_model(str(path), full_check=True)
        assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param
        for size in (1, 3):
            torch.testing.assert_close(run_onnx(path, x[:size])[0], run_onnx(path, x)[0][:size], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("traced_once")
def test_the_float_file_computes_the_float_model(tmp_path):
    sim, x = mixed()
    sim.export(tmp_path / "m", formats=["onnx"])
    torch.testing.assert_close(run_onnx(tmp_path / "m.float.onnx", x)[0], sim.float_output(x), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("bits", "opset", "kinds"), [((8, 8), 20, {"INT8", "UINT8"}), ((4, 16), 21, {"INT4", "UINT16", "UINT8"})]
)
def test_the_opset_is_no_newer_than_the_types_need(tmp_path, bits, opset, kinds):
    sim, _ = mixed({"bits": bits[0]}, {"bits": bits[1]})
    sim["softmax"].output.bits = 8
    sim.export(tmp_path / "m", formats=["onnx"])
    model = onnx.load(tmp_path / "m.onnx")
    assert [o.version for o in model.opset_import if o.domain == ""] == [opset]
    points = [i for i in model.graph.initializer if i.name.endswith("_zero_point")]
    assert {TensorProto.DataType.Name(i.data_type) for i in points} == kinds


@pytest.mark.usefixtures("traced_once")
def test_integer_weights_make_the_file_smaller_and_change_no_result(tmp_path):
    sim = sim_of("mobilenet", qlab.presets.w8a8())
    x = network("mobilenet").test[0][0][:16]
    for weights in ("float", "integer"):
        sim.export(tmp_path / weights, formats=["onnx"], weights=weights)
    results = [run_onnx(tmp_path / f"{weights}.onnx", x)[0] for weights in ("float", "integer")]
    assert torch.equal(*results)
    sizes = [(tmp_path / f"{weights}.onnx").stat().st_size for weights in ("float", "integer")]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.usefixtures("traced_once")
def test_int32_biases_are_stored_as_integers_times_input_and_weight_scale(tmp_path):
    sim = sim_of("encoder", qlab.presets.onnxruntime())
    sim.export(tmp_path / "m", formats=["onnx"])
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    layer = sim["blocks.0.mlp.expand"]
    scale = sim["blocks.0.norm2"].output.encoding.scale.double() * layer.weight.encoding.scale.double()
    wanted = (layer.layer.module.bias.detach().double() / scale.float().double()).round()
    assert constants["blocks.0.mlp.expand.bias_q"].dtype == np.int32
    assert np.array_equal(constants["blocks.0.mlp.expand.bias_q"], wanted.numpy())


@pytest.mark.usefixtures("traced_once")
def test_a_chosen_rounding_and_a_corrected_bias_reach_the_file(tmp_path):
    sim, x = mixed()
    weight = sim["first"].weight
    codes = qlab.quantization.quantize(weight.weight.detach(), weight.encoding)
    moved = codes + torch.where(codes < 127, 1, -1)
    weight.set_rounding(moved)
    sim["tied"].weight.set_bias_correction(torch.linspace(-1, 1, 8))
    sim.export(tmp_path / "m", formats=["onnx"])
    assert np.array_equal(integer_weights(tmp_path / "m.onnx")["first.weight"], moved.numpy())
    ours, theirs = sim.output(x), run_onnx(tmp_path / "m.onnx", x)[0]
    assert ((ours - theirs).abs() < sim["softmax"].output.encoding.scale / 2).float().mean() > 0.9
