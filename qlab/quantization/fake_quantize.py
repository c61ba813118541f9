"""Quantize, dequantize and both in one step, forward and backward.

The one definition of rounding in qlab: q = clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax), computed in
float32 by a true division, as ONNX's QuantizeLinear does.
"""

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


def fake_quantize(x: Tensor, encoding: Encoding) -> Tensor:
    """`x` rounded to the grid, as a float tensor; differentiable by the straight-through estimator.

    Gradient g of the result: to x it passes where x is within half a step of the grid's ends, else it is 0; to the
    scale it is the sum of g * (x_hat - x) / scale inside and g * x_hat / scale outside, to the zero point the sum of
    -g * scale outside. Source: Esser et al. 2020, arXiv:1902.08153; Jain et al. 2020, arXiv:1903.08066.
    Never changes `x`.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or encoding.scale.requires_grad or encoding.zero_point.requires_grad
    ):
        scale, zero_point = encoding.broadcast(x.shape)
        return _FakeQuantize.apply(x, scale, zero_point, encoding.qmin, encoding.qmax)
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
    def forward(ctx, x, scale, zero_point, qmin, qmax):  # type: ignore[no-untyped-def]
        wide = x if x.dtype == torch.float64 else x.float()
        ctx.limits, ctx.bounds = (qmin, qmax), None
        if scale.dim() == 0:  # one grid: numbers cost less than tensors of one element
            step, zero = scale.item(), float(round(zero_point.item()))
            ctx.bounds = (qmin - zero - 0.5) * step, (qmax - zero + 0.5) * step
            if x.device.type == "cpu" and wide.dtype == torch.float32:
                result = _rounded(wide, step, qmin - zero, qmax - zero)
            else:
                result = (wide / scale).round_().clamp_(qmin - zero, qmax - zero).mul_(scale)
            whole = zero_point
        else:
            whole = zero_point.round()
            result = torch.clamp((wide / scale).round_(), qmin - whole, qmax - whole).mul_(scale)
        result = result.to(x.dtype)
        ctx.save_for_backward(x, scale, whole, result)
        return result

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, zero_point, result = ctx.saved_tensors
        if ctx.bounds is not None:
            inside = torch.ops.aten.hardtanh_backward(grad.contiguous(), x.contiguous(), *ctx.bounds)
        else:
            qmin, qmax = ctx.limits
            low, high = (qmin - zero_point - 0.5) * scale, (qmax - zero_point + 0.5) * scale
            inside = grad * ((x > low) & (x < high))
        _, learns_scale, learns_zero_point = ctx.needs_input_grad[:3]
        grad_scale = grad_zero_point = None
        if learns_scale or learns_zero_point:
            outside = grad - inside
            if learns_scale:
                # Two sums of their own: in one of (result * grad - x * inside) the digits of the first would be lost.
                grad_scale = (_sum(inside, result - x, scale) + _sum(outside, result, scale)) / scale
            if learns_zero_point:
                grad_zero_point = _sum(outside, None, scale) * -scale
        return inside, grad_scale, grad_zero_point, None, None


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


def _sum(a: Tensor, b: Tensor | None, like: Tensor) -> Tensor:
    """The sum of a * b (or of a) over all but the axes of `like`, in its dtype."""
    a = a.to(like.dtype)
    if like.dim() == 0:
        return a.sum() if b is None else torch.dot(a.reshape(-1), b.to(like.dtype).reshape(-1))
    return (a if b is None else a * b).sum_to_size(like.shape)
