"""Quantize, dequantize and both in one step, forward and backward.

The one definition of rounding in qlab: q = clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax), computed in
float32 by a true division, as ONNX's QuantizeLinear does.
"""

import torch
from torch import Tensor

from qlab.quantization.encoding import Encoding

# Elements a block: 4 in-place passes over 128k floats stay inside a core's second-level cache (measured: 64k-256k).
_BLOCK = 1 << 17


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

    Gradient (u = x / scale): to x it passes where round(u) + zero_point is inside [qmin, qmax], else 0; to a scale or
    zero point that requires it as in Esser et al. 2020, arXiv:1902.08153 (scale) and Jain et al. 2020,
    arXiv:1903.08066 (zero point, through the range). Never changes `x`.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or encoding.scale.requires_grad or encoding.zero_point.requires_grad
    ):
        scale, zero_point = encoding.broadcast(x.shape)
        return _FakeQuantize.apply(x, scale, zero_point, encoding.qmin, encoding.qmax)
    return fake_quantize_(x.detach().clone(memory_format=torch.preserve_format), encoding)


def fake_quantize_(x: Tensor, encoding: Encoding) -> Tensor:
    """Changes `x`: rounds it to the grid in place, without gradient, block by block so that it stays in the cache."""
    if x.dtype != torch.float32:
        return x.copy_(fake_quantize_(x.float(), encoding))
    if encoding.scalars is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        scale, low, high = encoding.scalars
        if x.numel() > _BLOCK and (flat := _flat(x)) is not None:
            for block in flat.split(_BLOCK):
                block.div_(scale).round_().clamp_(low, high).mul_(scale)
            return x
        return x.div_(scale).round_().clamp_(low, high).mul_(scale)
    scale_, zero_point = encoding.broadcast(x.shape)
    x.div_(scale_).round_()
    torch.clamp(x, encoding.qmin - zero_point, encoding.qmax - zero_point, out=x)
    return x.mul_(scale_)


def _flat(x: Tensor) -> Tensor | None:
    """A one-dimensional view of the memory of `x` in any dense layout, or None where there is none."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax):  # type: ignore[no-untyped-def]
        levels = (x.float() / scale).round_()
        low, high = qmin - zero_point.round(), qmax - zero_point.round()
        clamped = torch.clamp(levels, low, high)
        inside = levels == clamped
        learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(inside, *((x, scale, clamped) if learned else ()))
        ctx.scale_shape, ctx.zero_point_shape = scale.shape, zero_point.shape
        return clamped.mul_(scale).to(x.dtype) if not learned else (clamped * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        inside, *rest = ctx.saved_tensors
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = grad_zero_point = None
        if rest:
            x, scale, clamped = rest
            if ctx.needs_input_grad[1]:
                slope = torch.where(inside, clamped - x / scale, clamped)
                grad_scale = (grad * slope).sum_to_size(ctx.scale_shape)
            if ctx.needs_input_grad[2]:
                grad_zero_point = (grad * ~inside * -scale).sum_to_size(ctx.zero_point_shape)
        return grad_x, grad_scale, grad_zero_point, None, None
