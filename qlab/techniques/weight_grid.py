"""Multiplies a layer's weight channel by channel and sees to its grid, its rounding and its bias correction.

A grid of which every channel takes one factor moves exactly: the integers stay and the scale takes the factor. So a
rounding that was learned, or an encoding that was trained, survives. Where one grid would need several factors, a
frozen encoding and a learned rounding are given up and the caller is told.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlab.graph.kernel import Kernel
from qlab.quantization import PER_CHANNEL, Encoding, WeightQuantizer, quantize
from qlab.sim import QuantSim


@dataclass(frozen=True)
class Rescaled:
    """What became of a weight's grid: 'found' anew from the weight, or 'kept' with its integers; and what to tell."""

    grid: str
    note: str = ""


def scale_weight(
    sim: QuantSim,
    kernel: Kernel,
    outputs: Tensor | None = None,
    inputs: Tensor | None = None,
    keep_integers: bool = False,
) -> Rescaled:
    """Changes the weight: output channel o is multiplied by outputs[o], input channel i by inputs[i].

    keep_integers: the integers of an encoding that is not frozen are kept, too, and a single grid becomes one a
    channel, where the factors allow it; the encoding is frozen then.
    """
    quantizer = sim.placed[kernel.name].weight
    factors = kernel.factors(outputs, inputs)
    if quantizer is None:
        _multiply(kernel.weight, factors)
        return Rescaled("none")
    encoding, codes = quantizer.required_encoding().copy(), quantizer.rounding
    holds = keep_integers or quantizer.frozen or quantizer.learned is not None or codes is not None
    if keep_integers and codes is None:
        codes = quantize(quantizer.weight, encoding)
    if keep_integers and encoding.axis is None:
        encoding = _one_a_channel(encoding, quantizer)
    moved = _moved(encoding, codes, factors)
    correction = quantizer.bias_correction
    _multiply(kernel.weight, factors)
    if moved is not None:
        if holds:
            _hold(quantizer, moved)
        if correction is not None and outputs is not None:
            moved_correction = correction.double() * outputs.to(correction.device)
            quantizer.set_bias_correction(moved_correction.to(correction.dtype))
        note = (
            f"{kernel.name!r}: {moved.clipped} of its integers moved by one step: a negative factor turned the lowest "
            "integer, whose opposite the grid does not have."
        )
        return Rescaled("kept" if holds else "found", note if holds and moved.clipped else "")
    lost = [
        *(["its integers"] if keep_integers else ["its frozen encoding"] if holds else []),
        *(["the rounding chosen for it"] if quantizer.rounding_is_stale else []),
        *(["its bias correction"] if correction is not None else []),
    ]
    quantizer.keep_learned_range()
    quantizer.frozen = False
    quantizer.set_rounding(None)
    quantizer.set_bias_correction(None)
    if not lost:
        return Rescaled("found")
    return Rescaled(
        "found",
        f"{kernel.name!r}: one grid cannot take several factors, so {' and '.join(lost)} had to go; its encoding was "
        "found anew and rounds to nearest. Apply the technique that chose them again.",
    )


@dataclass(frozen=True)
class _Moved:
    encoding: Encoding
    codes: Tensor | None
    clipped: int


@torch.no_grad()
def _multiply(weight: Tensor, factors: Tensor) -> None:
    weight.copy_(weight.double() * factors)


def _hold(quantizer: WeightQuantizer, moved: _Moved) -> None:
    if moved.encoding.axis is not None and quantizer.granularity.kind == "per_tensor":
        quantizer.spec = replace(quantizer.spec, granularity=PER_CHANNEL)
    quantizer.freeze(moved.encoding)
    if moved.codes is not None:
        quantizer.set_rounding(moved.codes)


def _one_a_channel(encoding: Encoding, quantizer: WeightQuantizer) -> Encoding:
    assert quantizer.axis is not None
    channels = quantizer.weight.shape[quantizer.axis]
    scale, zero_point = encoding.scale.expand(channels).clone(), encoding.zero_point.expand(channels).clone()
    return replace(encoding, scale=scale, zero_point=zero_point, axis=quantizer.axis)


def _moved(encoding: Encoding, codes: Tensor | None, factors: Tensor) -> _Moved | None:
    """Encoding and integers that stand for the weight times `factors`; None where a grid has several factors.

    A negative factor turns a grid around: on a symmetric one integers change sign, on another q becomes
    qmin + qmax - q and so does the zero point. A channel of factor 0 keeps its scale and becomes all zero.
    """
    rows = factors.reshape(1, -1) if encoding.axis is None else factors.movedim(encoding.axis, 0).flatten(1)
    if bool((rows.amin(1) != rows.amax(1)).any()):
        return None
    factor = rows[:, 0].to(encoding.scale.device)
    symmetric = encoding.is_symmetric
    if not symmetric and not bool(encoding.zero_point.any()) and bool((factor < 0).any()):
        return None  # an unsigned grid without a zero point has no negative values
    size = factor.abs().where(factor != 0, torch.ones_like(factor))
    shape = (-1,) if encoding.scale.dim() == 1 else (-1, 1) if encoding.scale.dim() == 2 else ()
    scale = (encoding.scale.double() * size.reshape(shape)).float()
    turned = (factor < 0).reshape(shape)
    opposite = encoding.zero_point if symmetric else encoding.qmin + encoding.qmax - encoding.zero_point
    zero_point = torch.where(turned, opposite, encoding.zero_point)
    found = replace(encoding, scale=scale, zero_point=zero_point)
    if codes is None:
        return _Moved(found, None, 0)
    negative = factors < 0
    mirrored = torch.where(negative, -codes if symmetric else encoding.qmin + encoding.qmax - codes, codes)
    _, zero = found.broadcast(codes.shape)
    mirrored = torch.where(factors == 0, zero.to(mirrored.dtype).expand_as(mirrored), mirrored)
    kept = mirrored.clamp(encoding.qmin, encoding.qmax)
    return _Moved(found, kept, int((kept != mirrored).sum()))
