"""A layer with a weight as plain matrix products, so that one formula serves all of them.

Every output of a convolution (any dimension, depthwise, grouped, transposed), linear layer or product with a parameter
is a row of inputs times a matrix: y = rows @ matrix.T, one independent problem a group. Rounding techniques and
sensitivity estimates work on the rows' second moments and never need to know which kind of layer they serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.graph.layer_graph import Layer


@dataclass(frozen=True)
class LinearForm:
    """How a layer's inputs become rows and its weight a matrix.

    Shapes: rows [groups, n, inputs], matrix [groups, outputs, inputs], n = samples x positions of the output.
    operand: the position of the data among the layer's arguments. windows: None for matrix products.
    """

    groups: int
    outputs: int
    inputs: int
    operand: int
    windows: "Windows | None" = None
    is_transposed: bool = False  # the weight is stored [inputs, outputs]

    def positions(self, x: Tensor) -> int:
        """How many rows the input `x` has in each group."""
        if self.windows is not None:
            return x.shape[0] * self.windows.count(x.shape[2:])
        return x[..., 0].numel() // self.groups

    def rows(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """The rows of `x` [groups, n, inputs]; only those at the indices `chosen` [m] where given."""
        if self.windows is None:
            flat = x.reshape(self.groups, -1, self.inputs)
            return flat if chosen is None else flat[:, chosen]
        windows = self.windows.of(x)  # [N, positions.., channels, kernel..], a view
        spatial = len(self.windows.kernel)
        if chosen is None:
            picked = windows.reshape(-1, *windows.shape[1 + spatial :])
        else:
            picked = windows[torch.unravel_index(chosen, windows.shape[: 1 + spatial])]
        return picked.reshape(len(picked), self.groups, self.inputs).transpose(0, 1)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or anything of its shape, as [groups, outputs, inputs]."""
        if self.windows is None:
            stored = weight.reshape(self.groups, *weight.shape[-2:])
            return stored.transpose(1, 2) if self.is_transposed else stored
        if not self.windows.transposed:
            return weight.reshape(self.groups, self.outputs, self.inputs)
        kernel = self.windows.kernel
        flipped = weight.flip(tuple(range(2, weight.dim()))).reshape(self.groups, -1, self.outputs, *kernel)
        return flipped.transpose(1, 2).reshape(self.groups, self.outputs, self.inputs)

    def weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `matrix`: back to the weight's own `shape`."""
        if self.windows is None:
            return (matrix.transpose(1, 2) if self.is_transposed else matrix).reshape(tuple(shape))
        if not self.windows.transposed:
            return matrix.reshape(tuple(shape))
        kernel = self.windows.kernel
        stored = matrix.reshape(self.groups, self.outputs, -1, *kernel).transpose(1, 2).reshape(tuple(shape))
        return stored.flip(tuple(range(2, len(shape))))


@dataclass(frozen=True)
class Windows:
    """The windows that a convolution looks through, in one to three dimensions.

    padding: (before, after) a dimension. mode: as in torch.nn.functional.pad. transposed: the input is first spread by
    `stride` with zeros between, which makes a transposed convolution an ordinary one with stride 1.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    mode: str = "constant"
    transposed: bool = False

    def count(self, size: Sequence[int]) -> int:
        """How many windows an input of spatial `size` has."""
        found = 1
        for d, length in enumerate(size):
            step, spread = (1, (length - 1) * self.stride[d] + 1) if self.transposed else (self.stride[d], length)
            reach = self.dilation[d] * (self.kernel[d] - 1) + 1
            found *= (spread + sum(self.padding[d]) - reach) // step + 1
        return found

    def of(self, x: Tensor) -> Tensor:
        """The windows of `x` [N, C, size..] as a view [N, positions.., C, kernel..] of its padded copy."""
        spatial = len(self.kernel)
        if self.transposed:
            size = [(length - 1) * step + 1 for length, step in zip(x.shape[2:], self.stride, strict=True)]
            spread = x.new_zeros(*x.shape[:2], *size)
            spread[(..., *(slice(None, None, step) for step in self.stride))] = x
            x = spread
        if any(map(any, self.padding)):
            flat = [side for pair in reversed(self.padding) for side in pair]
            x = F.pad(x, flat, mode=self.mode)
        for d in range(spatial):
            reach = self.dilation[d] * (self.kernel[d] - 1) + 1
            x = x.unfold(2 + d, reach, 1 if self.transposed else self.stride[d])[..., :: self.dilation[d]]
        return x.movedim(1, 1 + spatial)


def linear_form(layer: Layer) -> LinearForm | None:
    """The form of `layer`, None where it is no matrix product with a weight (an embedding, a bilinear layer)."""
    source = layer.weight_source
    if source is None:
        return None
    owner, attribute, _ = source
    weight = getattr(owner, attribute)
    if layer.kind in ("conv", "depthwise_conv", "conv_transpose"):
        return _convolution(layer, weight)
    if layer.kind == "linear":
        operand, transposed = (1, True) if layer.function_name == "addmm" else (0, False)
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        return LinearForm(1, outputs, inputs, operand, is_transposed=transposed)
    if layer.kind == "matmul" and (weight.dim() == 2 or layer.function_name == "bmm"):
        inputs, outputs = weight.shape[-2:]
        return LinearForm(weight.shape[0] if weight.dim() == 3 else 1, outputs, inputs, 0, is_transposed=True)
    return None


def _convolution(layer: Layer, weight: Tensor) -> LinearForm:
    asked = _settings(layer)
    spatial, kernel, groups = weight.dim() - 2, tuple(weight.shape[2:]), int(asked["groups"])
    stride, dilation = _each(asked["stride"], spatial), _each(asked["dilation"], spatial)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if asked["transposed"]:
        sides, extra = _each(asked["padding"], spatial), _each(asked["output_padding"], spatial)
        padding = tuple((r - p, r - p + e) for r, p, e in zip(reach, sides, extra, strict=True))
        outputs, inputs = weight.shape[1], weight.shape[0] // groups
    else:
        if asked["padding"] == "same":
            padding = tuple((r // 2, r - r // 2) for r in reach)
        else:
            sides = (0,) * spatial if asked["padding"] == "valid" else _each(asked["padding"], spatial)
            padding = tuple((p, p) for p in sides)
        outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    mode = {"zeros": "constant"}.get(asked["padding_mode"], asked["padding_mode"])
    windows = Windows(kernel, stride, dilation, padding, mode, bool(asked["transposed"]))
    return LinearForm(groups, outputs, inputs * weight[0, 0].numel(), 0, windows)


def _settings(layer: Layer) -> dict[str, Any]:
    """Stride, padding and so on of a convolution, written as a module or as a function."""
    found: dict[str, Any] = {"output_padding": 0, "padding_mode": "zeros"}
    if layer.module is not None:
        names = ("stride", "padding", "dilation", "groups", "output_padding", "padding_mode")
        found |= {name: getattr(layer.module, name) for name in names}
        return found | {"transposed": isinstance(layer.module, nn.modules.conv._ConvTransposeNd)}
    arguments = layer.function._schema.arguments  # type: ignore[union-attr]
    found["transposed"] = "transpose" in layer.function_name
    for position, argument in enumerate(arguments):
        given = layer.args[position] if position < len(layer.args) else layer.kwargs.get(argument.name)
        if given is None and argument.has_default_value():
            given = argument.default_value
        found[argument.name] = given
    return found


def _each(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * spatial if len(values) == 1 else values
