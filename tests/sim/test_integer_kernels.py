"""Layers computed in integers, against ONNX Runtime's integer operators given the same integers."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import qlab
from qlab.graph import Replay
from qlab.quantization import quantize

DOMAINS = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]


def run_operator(name, inputs, domain="", **attributes):
    """The result of one ONNX operator whose inputs are all given as arrays."""
    names = [f"i{k}" for k in range(len(inputs))]
    node = helper.make_node(name, names, ["y"], domain=domain, **attributes)
    types = {np.dtype(t): getattr(TensorProto, t.upper()) for t in ("uint8", "int8", "int32")}
    types[np.dtype(np.float32)] = TensorProto.FLOAT
    constants = [
        helper.make_tensor(n, types[v.dtype], v.shape, v.reshape(-1)) for n, v in zip(names, inputs, strict=True)
    ]
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    graph = helper.make_graph([node], "one", [], [output], constants)
    model = helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {})[0].astype(np.int32))


def integers(quantizer, values=None):
    values = quantizer.weight.detach() if values is None else values
    return quantize(values, quantizer.encoding).numpy()


def grid(quantizer):
    encoding = quantizer.encoding
    signed = encoding.qmin < 0
    return encoding.scale.numpy(), encoding.zero_point.numpy().astype(np.int8 if signed else np.uint8)


def bias_integers(sim, name):
    scale = sim[name].layer.inputs[0]
    scale = sim[scale.name].output.encoding.scale.double() * sim[name].weight.encoding.scale.double()
    return (sim[name].layer.module.bias.detach().double() / scale).round().to(torch.int32).numpy()


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_convolution_and_its_relu_equal_QLinearConv_bit_for_bit(per_channel):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
    x = torch.randn(4, 8, 24, 24)
    sim = qlab.QuantSim(model, x, qlab.presets.onnxruntime(per_channel=per_channel))
    sim.calibrate([x])
    x = torch.randn(8, 8, 24, 24)
    ours = quantize(sim.output(x), sim["1"].output.encoding)
    data, weight = integers(sim["input"].output, x).astype(np.uint8), integers(sim["0"].weight).astype(np.int8)
    (s_x, z_x), (s_w, z_w), (s_y, z_y) = grid(sim["input"].output), grid(sim["0"].weight), grid(sim["1"].output)
    inputs = [data, s_x, z_x, weight, s_w, z_w, s_y, z_y, bias_integers(sim, "0")]
    theirs = run_operator("QLinearConv", inputs, pads=[1, 1, 1, 1])
    assert theirs.unique().numel() > 50
    assert torch.equal(ours, theirs)


def test_a_linear_layer_equals_QGemm_bit_for_bit():
    model = nn.Sequential(nn.Linear(96, 40))
    x = torch.randn(512, 96)
    sim = qlab.QuantSim(model, x, qlab.presets.onnxruntime())
    sim.calibrate([x])
    ours = quantize(sim.output(x), sim["0"].output.encoding)
    data, weight = integers(sim["input"].output, x).astype(np.uint8), integers(sim["0"].weight).astype(np.int8)
    (s_x, z_x), (s_w, z_w), (s_y, z_y) = grid(sim["input"].output), grid(sim["0"].weight), grid(sim["0"].output)
    inputs = [data, s_x, z_x, weight, s_w, z_w, bias_integers(sim, "0"), s_y, z_y]
    theirs = run_operator("QGemm", inputs, domain="com.microsoft", transB=1)
    assert torch.equal(ours, theirs)


class Product(nn.Module):
    def forward(self, a, b):
        return torch.matmul(a, b)


def test_a_product_of_activations_equals_QLinearMatMul_bit_for_bit():
    a, b = torch.randn(2, 4, 33, 24), torch.randn(2, 4, 24, 50)
    sim = qlab.QuantSim(Product(), (a, b), qlab.presets.onnxruntime())
    sim.calibrate([(a, b)])
    product = next(layer for layer in sim.graph if layer.kind == "matmul")
    ours = quantize(sim.output((a, b)), sim[product.name].output.encoding)
    inputs = []
    for layer, value in zip(sim.graph.input_layers, (a, b), strict=True):
        quantizer = sim[layer.name].output
        inputs += [integers(quantizer, value).astype(np.uint8), *grid(quantizer)]
    theirs = run_operator("QLinearMatMul", [*inputs, *grid(sim[product.name].output)])
    assert torch.equal(ours, theirs)


class Sum(nn.Module):
    def __init__(self, rectified):
        super().__init__()
        self.last = nn.ReLU() if rectified else nn.Identity()

    def forward(self, a, b):
        return self.last(a + b)


def sum_sim(preset, rectified):
    data = tuple(torch.randn(2, 256) for _ in range(2))
    sim = qlab.QuantSim(Sum(rectified), data, preset)
    sim.calibrate([data])
    return sim, [sim[layer.name].output for layer in sim.graph.input_layers], sim[sim.graph.outputs[0].name].output


def sums(sim, inputs, last, ranges):
    """Sums of all pairs of bytes on grids of those ranges: the sim's integers, and ONNX Runtime's."""
    for quantizer, (low, high) in zip((*inputs, last), ranges, strict=True):
        quantizer.set_range(low, high)
    codes = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T.reshape(2, 256, 256)
    values = [(code - q.encoding.zero_point) * q.encoding.scale for code, q in zip(codes, inputs, strict=True)]
    ours = quantize(sim.output(tuple(values)), last.encoding)
    given = [part for code, q in zip(codes, inputs, strict=True) for part in (code.numpy().astype(np.uint8), *grid(q))]
    return ours, run_operator("QLinearAdd", [*given, *grid(last)], "com.microsoft")


@pytest.mark.parametrize("rectified", [False, True])
def test_a_sum_of_activations_equals_QLinearAdd_bit_for_bit_where_float_arithmetic_does_not(rectified):
    exact, floating = (sum_sim(p, rectified) for p in (qlab.presets.onnxruntime(), qlab.presets.w8a8()))
    generator, differing = torch.Generator().manual_seed(0), 0
    for _ in range(12):
        low, high = -2 * torch.rand(3, generator=generator), 2 * torch.rand(3, generator=generator)
        ranges = [(float(low[i]), float(high[i])) for i in (0, 1)] + [(0.0 if rectified else float(low[2]), 2.0)]
        ours, theirs = sums(*exact, ranges)
        assert theirs.unique().numel() > 50
        assert torch.equal(ours, theirs)
        differing += int((sums(*floating, ranges)[0] != theirs).sum())
    assert differing > 0


def test_resuming_equals_a_full_run_when_the_grid_that_an_addition_is_rounded_to_changes():
    sim, _, last = sum_sim(qlab.presets.onnxruntime(), True)
    x = torch.randn(4, 256), torch.randn(4, 256)
    replay = Replay(sim.graph, [sim.inputs(x)], sim.call, sim.fingerprint)
    with torch.no_grad():
        replay.outputs()
        last.set_range(0.0, 0.3)
        assert torch.equal(replay.outputs()[0], sim.output(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.softmax = nn.Linear(12, 12), nn.Softmax(-1)

    def forward(self, x):
        return self.softmax(self.query(x))


@pytest.mark.parametrize(("preset", "equal"), [(qlab.presets.onnxruntime(), True), (qlab.presets.w8a8(), False)])
def test_softmax_equals_QLinearSoftmax_on_steps_of_1_256_and_not_on_1_255(preset, equal):
    x = torch.randn(64, 65, 12)
    sim = qlab.QuantSim(Attention(), x, preset)
    sim.calibrate([x])
    logits, softmax = sim["query"].output, sim["softmax"].output
    data = quantize(torch.randn(64, 65, 12) * 0.3, logits.encoding).numpy().astype(np.uint8)
    probabilities = torch.softmax((torch.from_numpy(data).float() - logits.encoding.zero_point) * logits.scale, -1)
    ours = quantize(probabilities, softmax.encoding)
    theirs = run_operator("QLinearSoftmax", [data, *grid(logits), *grid(softmax)], "com.microsoft", axis=-1, opset=13)
    assert torch.equal(ours, theirs) == equal


def test_in_eval_mode_gradients_flow_and_the_value_is_that_of_the_integer_kernel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
    x = torch.randn(6, 3, 12, 12)
    sim = qlab.QuantSim(model, x, qlab.presets.onnxruntime())
    sim.calibrate([x])
    y = sim(x)
    assert torch.equal(y, sim.output(x))
    y.square().sum().backward()
    assert sim.model[0].weight.grad.abs().sum() > 0


def test_resuming_equals_a_full_run_when_the_grid_that_a_sum_is_rounded_to_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
    x = torch.randn(6, 3, 12, 12)
    sim = qlab.QuantSim(model, x, qlab.presets.onnxruntime())
    sim.calibrate([x])
    replay = Replay(sim.graph, [sim.inputs(x)], sim.call, sim.fingerprint)
    with torch.no_grad():
        replay.outputs()
        sim["1"].output.set_range(0.0, 0.5)
        resumed = replay.outputs()[0]
    assert torch.equal(resumed, sim.output(x))


def test_layers_with_four_bit_weights_are_computed_in_float():
    x = torch.randn(6, 3, 12, 12)
    preset = qlab.presets.w4a8(int32_bias=True)
    sim = qlab.QuantSim(nn.Sequential(nn.Conv2d(3, 4, 3)), x, preset)
    sim.calibrate([x])
    quantizer = sim["0"].weight
    grid_ = sim["input"].output.encoding
    scale = grid_.scale.double() * quantizer.encoding.scale.double()
    bias = ((sim.model[0].bias.double() / scale).round() * scale).float()
    rounded = sim["input"].output(x)
    wanted = sim["0"].output(torch.conv2d(rounded, quantizer.quantized(), bias))
    torch.testing.assert_close(sim.output(x), wanted, rtol=0, atol=1e-6)
