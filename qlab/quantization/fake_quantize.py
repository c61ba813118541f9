"""Quantize, dequantize and both in one step, forward and backward.

The one definition of rounding in qlab: q = clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax), computed in
float32 by a true division, as ONNX's QuantizeLinear does.
"""

from typing import Any

import torch
from torch import Tensor

from qlab.quantization.encoding import Encoding

# Elements a block: smaller ones (measured: 64k to 1M) cost more calls than the nearer cache saves.
_BLOCK = 1 << 19


def quantize(x: Tensor, encoding: Encoding) -> Tensor:
    """The integers (int32) that stand for `x` on the grid; the shape of `x`.

    >>> quantize(torch.tensor([0.0, 0.26, 9.0]), Encoding(torch.tensor(0.5), torch.tensor(2.0), 0, 15)).tolist()
    [2, 3, 15]
    """
    scale, zero_point = encoding.broadcast(x.shape)
    codes = (x.detach().float() / scale).round_().add_(zero_point).clamp_(encoding.qmin, encoding.qmax)
    return codes.to(torch.int32)


def dequantize(codes: Tensor, encoding: Encoding) -> Tensor:
    """The real numbers that the integers `codes` stand for: (codes - zero_point) * scale, float32."""
    scale, zero_point = encoding.broadcast(codes.shape)
    return (codes.to(scale.dtype) - zero_point) * scale


def fake_quantize(x: Tensor, encoding: Encoding, rectifies: bool = False) -> Tensor:
    """`x` rounded to the grid, as a float tensor; differentiable by the straight-through estimator.

    Gradient g of the result: to x it passes where x is within half a step of the grid's ends, else it is 0; to the
    scale it is the sum of g * (x_hat - x) / scale inside and g * x_hat / scale outside, to the zero point the sum of
    -g * scale outside. Source: Esser et al. 2020, arXiv:1902.08153; Jain et al. 2020, arXiv:1903.08066.
    Never changes `x`. rectifies: `x` stands for relu(x), and the one grid begins at 0: gradients are those through
    the ReLU.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or encoding.scale.requires_grad or encoding.zero_point.requires_grad
    ):
        grid = encoding.over(x.shape)
        return _FakeQuantize.apply(x, grid.scale, grid.zero_point, grid, rectifies)
    scalars = _scalars(x, encoding)
    if scalars is None:
        return fake_quantize_(x.detach().clone(memory_format=torch.preserve_format), encoding)
    scale, low, high = scalars
    x = x.detach()
    if x.numel() > _BLOCK and (flat := _flat(x)) is not None:
        result = torch.empty_like(x)
        flat_result = _flat(result)
        assert flat_result is not None
        for source, block in zip(flat.split(_BLOCK), flat_result.split(_BLOCK), strict=True):
            torch.div(source, scale, out=block).round_().clamp_(low, high).mul_(scale)
        return result
    return x.div(scale).round_().clamp_(low, high).mul_(scale)


def fake_quantize_(x: Tensor, encoding: Encoding) -> Tensor:
    """Changes `x`: rounds it to the grid in place, without gradient, block by block so that it stays in the cache."""
    if x.dtype != torch.float32:
        return x.copy_(fake_quantize_(x.float(), encoding))
    scalars = _scalars(x, encoding)
    if scalars is not None:
        scale, low, high = scalars
        if x.numel() > _BLOCK and (flat := _flat(x)) is not None:
            for block in flat.split(_BLOCK):
                block.div_(scale).round_().clamp_(low, high).mul_(scale)
            return x
        return x.div_(scale).round_().clamp_(low, high).mul_(scale)
    scale_, zero_point = encoding.broadcast(x.shape)
    x.div_(scale_).round_()
    torch.clamp(x, encoding.qmin - zero_point, encoding.qmax - zero_point, out=x)
    return x.mul_(scale_)


def _scalars(x: Tensor, encoding: Encoding) -> tuple[float, float, float] | None:
    """The grid as numbers, where kernels that take numbers are the fastest; None elsewhere."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return encoding.scalars


def _flat(x: Tensor) -> Tensor | None:
    """A one-dimensional view of the memory of `x` in any dense layout, or None where there is none."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


class _FakeQuantize(torch.autograd.Function):
    """Keeps x and the result, which the neighbouring layers keep anyway, and no mask."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, grid, rectifies):  # type: ignore[no-untyped-def]
        result, ctx.bounds = round_forward(x, grid, rectifies)
        ctx.grid = grid
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, result = ctx.saved_tensors
        of_scale, of_zero_point = ctx.needs_input_grad[1:3]
        inside, *of_grid = round_backward(grad, x, result, ctx.grid, ctx.bounds, of_scale, of_zero_point)
        like = ctx.grid.scale
        found = (torch.full_like(like, slope) if isinstance(slope, float) else slope for slope in of_grid)
        return inside, *found, None, None


Bounds = tuple[Any, Any]
"""The open interval of values whose gradient passes: numbers, or tensors that broadcast against the values."""


def round_forward(x: Tensor, grid: Encoding, rectifies: bool = False) -> tuple[Tensor, Bounds]:
    """(`x` on the grid, which broadcasts against it; the bounds of `round_backward`), without gradient.

    rectifies: the one grid begins at 0, and `x` stands for relu(x).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    numbers = grid.scalars
    if numbers is not None:  # one grid: numbers cost less than tensors of one element
        scale, low, high = numbers
        if x.device.type == "cpu" and wide.dtype == torch.float32:
            result = _rounded(wide, scale, low, high)
        else:
            result = (wide / grid.scale).round_().clamp_(low, high).mul_(grid.scale)
        bounds: Bounds = (0.0 if rectifies else (low - 0.5) * scale, (high + 0.5) * scale)
    else:
        lows, highs = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
        result = torch.clamp((wide / grid.scale).round_(), lows, highs).mul_(grid.scale)
        bounds = (lows - 0.5) * grid.scale, (highs + 0.5) * grid.scale
    return result.to(x.dtype), bounds


def round_backward(
    grad: Tensor, x: Tensor, result: Tensor, grid: Encoding, bounds: Bounds, of_scale: bool, of_zero_point: bool
) -> tuple[Tensor, Any, Any]:
    """The gradients to x, scale and zero point, those two None where not asked for.

    They are shaped as the grid's scale, and numbers where there is one grid on the processor.
    """
    numbers = grid.scalars
    if numbers is not None:
        inside = torch.ops.aten.hardtanh_backward(grad.contiguous(), x.contiguous(), *bounds)
    else:
        inside = grad * ((x > bounds[0]) & (x < bounds[1]))
    if not of_scale and not of_zero_point:
        return inside, None, None
    scale = grid.scale if numbers is None or x.device.type != "cpu" else numbers[0]
    # Two sums of their own: in one of (result * grad - x * inside) the digits of the first would be lost.
    rest = result - x
    within = _sum(inside, rest, grid.scale)
    outside = torch.sub(grad, inside, out=rest)
    slope = (within + _sum(outside, result, grid.scale)) / scale if of_scale else None
    return inside, slope, _sum(outside, None, grid.scale) * -scale if of_zero_point else None


def _rounded(x: Tensor, scale: float, low: float, high: float) -> Tensor:
    """A new tensor, `x` rounded to one grid; as `fake_quantize_`, without the copy that comes before."""
    if x.numel() > _BLOCK and (flat := _flat(x)) is not None:
        result = torch.empty_like(x)
        into = _flat(result)
        if into is not None:
            for block, out in zip(flat.split(_BLOCK), into.split(_BLOCK), strict=True):
                torch.div(block, scale, out=out).round_().clamp_(low, high).mul_(scale)
            return result
    return x.div(scale).round_().clamp_(low, high).mul_(scale)


def _sum(a: Tensor, b: Tensor | None, like: Tensor) -> Any:
    """The sum of a * b (or of a) over all but the axes of `like`, in its dtype; a number for all on the processor."""
    a = a.to(like.dtype)
    if like.dim() == 0:
        total = a.sum() if b is None else torch.dot(a.reshape(-1), b.to(like.dtype).reshape(-1))
        return total.item() if a.device.type == "cpu" else total
    return (a if b is None else a * b).sum_to_size(like.shape)
