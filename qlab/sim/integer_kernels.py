"""Layers computed as an integer kernel computes them: exact sums of integers, one rounding to the output's grid.

In floating point every product carries its own rounding error, and among a million outputs a few fall on the other
side of a half step; each then travels through all layers that follow. Here inputs and weights are taken as their
integers. Sums of them are exact in float32 up to 2^24, so a kernel's int32 sums come at the price of a float layer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.graph import Layer
from qlab.quantization import Encoding, Quantizer
from qlab.sim.placement import Role

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim

IntegerKernel = Callable[[tuple[Any, ...], "Tensor | None"], "Tensor | None"]
"""Takes the layer's arguments and its float bias; None where the grids in force are not those of an integer kernel."""


def integer_kernel(sim: "QuantSim", layer: Layer) -> IntegerKernel | None:
    """The kernel of a convolution, linear layer, product or sum of two activations; None for other layers.

    The arithmetic is that of ONNX Runtime 1.32's CPU kernels (QLinearConv, QGemm, QLinearMatMul): the sum, as float32,
    times the float32 number (input scale * weight scale) / output scale, rounded half to even. A linear layer on more
    than two axes is not requantized at once there (MatMulIntegerToFloat): its sum is scaled to a float, then rounded.
    An addition (QLinearAdd) scales both integers to the output's grid by fused multiply-adds, then rounds.
    """
    if isinstance(layer.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        return _WeightKernel(sim, layer) if sim.placed[layer.name].weight is not None else None
    if layer.kind == "matmul" and layer.function_name in ("matmul", "bmm") and len(layer.inputs) == 2:
        return _ProductKernel(sim, layer) if sim.placed[layer.name].weight is None else None
    if layer.kind == "add" and len(layer.inputs) == len(layer.args) == 2 and not layer.kwargs:
        return _SumKernel(sim, layer)
    return None


class _WeightKernel:
    def __init__(self, sim: "QuantSim", layer: Layer) -> None:
        self._sim, self._layer, self._module = sim, layer, layer.module
        self._weight = sim.placed[layer.name].weight
        self._output = requantizer(sim, layer)
        self._codes: tuple[Tensor, Tensor] | None = None

    def __call__(self, args: tuple[Any, ...], bias: Tensor | None) -> Tensor | None:
        scale = self._sim.bias_scale(self._layer)
        grid = _byte(self._sim.input_quantizer(self._layer))
        if scale is None or grid is None or self._weight is None or _byte(self._weight) is None:
            return None
        module: Any = self._module
        x, weight = _integers(args[0], grid), self._weight_codes()
        codes = None if bias is None else (bias.double() / scale.double()).round().float()
        output = _whole_byte(self._output)
        if isinstance(module, nn.Linear) and (x.dim() != 2 or output is None):
            value = F.linear(x, weight).mul_(scale)
            return value if codes is None else value.add_(codes * scale)
        if output is None:
            return None
        sums = F.linear(x, weight, codes) if isinstance(module, nn.Linear) else module._conv_forward(x, weight, codes)
        factor = scale / output.scale
        if factor.dim():
            factor = factor.view(-1, *[1] * (sums.dim() - 2))
        return sums.mul_(factor).round_().mul_(output.scale)

    def _weight_codes(self) -> Tensor:
        assert self._weight is not None
        quantized = self._weight.quantized()
        if self._codes is None or self._codes[0] is not quantized:
            self._codes = quantized, _integers(quantized, self._weight.required_encoding())
        return self._codes[1]


class _OfTwo:
    """A kernel of two activations."""

    def __init__(self, sim: "QuantSim", layer: Layer) -> None:
        self._inputs = [sim.placed[source.name].output for source in layer.inputs]
        self._output = requantizer(sim, layer)

    def _grids(self) -> tuple[Encoding, Encoding, Encoding] | None:
        """Those of both inputs and of the output, None where one is not an integer kernel's."""
        left, right = (_byte(quantizer) for quantizer in self._inputs)
        output = _whole_byte(self._output)
        return None if left is None or right is None or output is None else (left, right, output)


class _ProductKernel(_OfTwo):
    def __call__(self, args: tuple[Any, ...], bias: Tensor | None) -> Tensor | None:
        grids = self._grids()
        if grids is None:
            return None
        left, right, output = grids
        sums = torch.matmul(_integers(args[0], left), _integers(args[1], right))
        return sums.mul_(left.scale * right.scale / output.scale).round_().mul_(output.scale)


class _SumKernel(_OfTwo):
    """a * ra + (b * rb + (zc - (ra * za + rb * zb))), with ra = scale_a / scale_c, each `x * y + z` rounded once."""

    def __call__(self, args: tuple[Any, ...], bias: Tensor | None) -> Tensor | None:
        grids = self._grids()
        if grids is None or grids[0].scale.dim() or grids[1].scale.dim():
            return None
        left, right, output = grids
        first, second = left.scale / output.scale, right.scale / output.scale
        at_zero = _fused(left.zero_point.float(), first, second * right.zero_point.float())
        value = _fused(_integers(args[1], right).add_(right.zero_point), second, output.zero_point - at_zero)
        value = _fused(_integers(args[0], left).add_(left.zero_point), first, value)
        return value.round_().sub_(output.zero_point).mul_(output.scale)


def _fused(x: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """x * factor + addend, rounded once: in float64 the product of a byte is exact."""
    return (x.double().mul_(factor) + addend).float()


def requantizer(sim: "QuantSim", layer: Layer) -> Quantizer | None:
    """The quantizer to whose grid the layer's sum is rounded at once: its own, or that behind a ReLU; None if none."""
    while sim.placed[layer.name].role is Role.FUSED:
        users = [user for user in layer.users if user.kind != "size"]
        if len(users) != 1 or users[0].kind not in ("relu", "relu6", "clip", "identity"):
            return None
        layer = users[0]
    entry = sim.placed[layer.name]
    return entry.output if entry.role is Role.QUANTIZED else None


def _byte(quantizer: Quantizer | None) -> Encoding | None:
    """The grid in force if integer kernels take it: of at most 8 bits, and one for the tensor or, of a weight, each
    channel."""
    if quantizer is None or not quantizer.enabled or quantizer.encoding is None:
        return None
    encoding = quantizer.encoding
    return encoding if 4 < encoding.bits <= 8 and encoding.block_size is None else None


def _whole_byte(quantizer: Quantizer | None) -> Encoding | None:
    """The grid in force if an integer kernel can write it: one for the tensor, as wide as its type."""
    encoding = _byte(quantizer)
    return encoding if encoding is not None and encoding.scale.dim() == 0 and encoding.bits == 8 else None


def _integers(x: Tensor, encoding: Encoding) -> Tensor:
    """The integers that values on the grid stand for, less the zero point, as floats."""
    return x.div(encoding.broadcast(x.shape)[0]).round_()
