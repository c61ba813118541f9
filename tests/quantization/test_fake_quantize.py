"""Rounding is checked against a float64 oracle, against ONNX Runtime and, for gradients, against finite differences."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qlab.quantization import Encoding, dequantize, fake_quantize, fake_quantize_, quantize

finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def oracle(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    """Quantize and dequantize with the ratio rounded to float32, as the definition says, everything else in float64."""
    ratio = (x.astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
    codes = np.clip(np.rint(ratio) + zero_point, qmin, qmax)
    return ((codes - zero_point) * scale.astype(np.float64)).astype(np.float64)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(finite, min_size=1, max_size=40),
    st.floats(2**-13, 100, width=32),
    st.integers(2, 16),
    st.booleans(),
    st.data(),
)
def test_rounding_equals_the_float64_oracle(values, scale, bits, signed, data):
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    zero_point = 0 if signed else data.draw(st.integers(qmin, qmax))
    x = torch.tensor(values, dtype=torch.float32)
    encoding = Encoding(torch.tensor(scale), torch.tensor(float(zero_point)), qmin, qmax)
    want = oracle(x.numpy(), np.float32(scale), np.float64(zero_point), qmin, qmax)
    np.testing.assert_allclose(fake_quantize(x, encoding).numpy(), want, rtol=2e-7, atol=0)
    codes = quantize(x, encoding)
    assert int(codes.min()) >= qmin
    assert int(codes.max()) <= qmax
    assert torch.equal(dequantize(codes, encoding), fake_quantize(x, encoding))


def onnx_runtime(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None) -> np.ndarray:
    kind = {np.dtype("uint8"): TensorProto.UINT8, np.dtype("int8"): TensorProto.INT8}[zero_point.dtype]
    attributes = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
        ],
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(x.shape))],
        [
            helper.make_tensor("s", TensorProto.FLOAT, scale.shape, scale.ravel()),
            helper.make_tensor("z", kind, zero_point.shape, zero_point.ravel()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(2**-10, 3, width=32), st.integers(0, 255))
def test_per_tensor_equals_onnx_runtime_also_at_half_points(seed, scale, zero_point):
    generator = np.random.default_rng(seed)
    x = np.concatenate([generator.normal(0, 40 * scale, 200), (np.arange(-60, 60) + 0.5) * scale]).astype(np.float32)
    encoding = Encoding(torch.tensor(scale), torch.tensor(float(zero_point)), 0, 255)
    want = onnx_runtime(x, np.float32(scale).reshape(()), np.uint8(zero_point).reshape(()), None)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), encoding).numpy(), want)


def test_per_channel_equals_onnx_runtime_on_every_axis():
    generator = np.random.default_rng(0)
    x = generator.normal(0, 3, (4, 5, 6)).astype(np.float32)
    for axis in range(3):
        scale = generator.uniform(0.01, 0.2, x.shape[axis]).astype(np.float32)
        zero_point = np.zeros(x.shape[axis], np.int8)
        encoding = Encoding(torch.from_numpy(scale), torch.zeros(x.shape[axis]), -128, 127, axis)
        want = onnx_runtime(x, scale, zero_point, axis)
        np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), encoding).numpy(), want)


def test_blocks_equal_one_grid_for_each_block():
    x = torch.randn(4, 10)
    scale = torch.rand(4, 3) + 0.1
    encoding = Encoding(scale, torch.zeros(4, 3), -8, 7, axis=0, block_size=4)
    for row in range(4):
        for block in range(3):
            part = x[row, 4 * block : 4 * block + 4]
            alone = Encoding(scale[row, block], torch.tensor(0.0), -8, 7)
            assert torch.equal(fake_quantize(x, encoding)[row, 4 * block : 4 * block + 4], fake_quantize(part, alone))


def test_a_large_tensor_is_rounded_like_a_small_one_in_any_memory_layout():
    encoding = Encoding(torch.tensor(0.03), torch.tensor(100.0), 0, 255)
    x = torch.randn(3, 16, 70, 71)
    want = torch.stack([fake_quantize(image, encoding) for image in x])
    for y in (x.clone(), x.to(memory_format=torch.channels_last), x.transpose(1, 3).clone().transpose(1, 3)):
        result = fake_quantize_(y, encoding)
        assert result is y
        assert torch.equal(result, want)


def test_fake_quantize_leaves_its_input_alone():
    x = torch.randn(100)
    before = x.clone()
    fake_quantize(x, Encoding(torch.tensor(0.1), torch.tensor(0.0), -8, 7))
    assert torch.equal(x, before)


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_equal_finite_differences_of_the_straight_through_surrogate(axis):
    torch.manual_seed(0)
    x = torch.randn(3, 50, dtype=torch.float64) * 3
    scale = torch.tensor([0.11, 0.2, 0.3], dtype=torch.float64) if axis == 0 else torch.tensor(0.2, dtype=torch.float64)
    zero_point = torch.full_like(scale, 7.0)
    weight = torch.randn(3, 50, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    fake_quantize_in_double(leaves, axis, weight).backward()

    def loss(x_, scale_, zero_point_):
        s, z = (t.view(-1, 1) if axis == 0 else t for t in (scale_, zero_point_))
        s0 = scale.view(-1, 1) if axis == 0 else scale
        levels = torch.round(x / s0)
        return (surrogate_at(x_, s, z, 0, 15, levels, x / s0) * weight).sum()

    for position, leaf in enumerate(leaves):
        numeric = torch.zeros_like(leaf)
        for index in np.ndindex(*leaf.shape) if leaf.dim() else [()]:
            values = []
            for step in (1e-6, -1e-6):
                moved = [x.clone(), scale.clone(), zero_point.clone()]
                moved[position][index] += step
                values.append(loss(*moved))
            numeric[index] = (values[0] - values[1]) / 2e-6
        assert torch.allclose(leaf.grad, numeric, atol=1e-5), position


def surrogate_at(x, scale, zero_point, qmin, qmax, levels, ratio):
    """x / scale with the rounding error frozen at the expansion point; clamped values stay clamped."""
    inside = (levels + zero_point.detach().round() >= qmin) & (levels + zero_point.detach().round() <= qmax)
    linear = (x / scale + (levels - ratio)) * scale
    low, high = (qmin - zero_point) * scale, (qmax - zero_point) * scale
    return torch.where(inside, linear, torch.where(levels + zero_point.detach() < qmin, low, high))


def fake_quantize_in_double(leaves, axis, weight):
    x, scale, zero_point = leaves
    return (fake_quantize(x, Encoding(scale, zero_point, 0, 15, axis)).double() * weight).sum()
