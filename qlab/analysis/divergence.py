"""How far a result is from the float model's, sample by sample: SQNR and KL beside every score, at no extra forward.

A score such as accuracy hardly moves when one layer is quantized; these two do.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qlab.sim.evaluate import float_tensors

COLUMNS = 4  # kl, predictions, signal, noise


def divergence_rows(reference: Any, output: Any) -> Tensor:
    """(KL summed over predictions, predictions, signal, noise) of each sample, float64 [samples, 4].

    KL(softmax(reference) || softmax(output)) in nats over the classes of the first float tensor (axis 1 of images,
    else the last), NaN where there are no classes. Signal and noise are sums of squares over all float tensors.
    """
    pairs = list(zip(float_tensors(reference), float_tensors(output), strict=True))
    if not pairs:
        return torch.zeros(0, COLUMNS, dtype=torch.float64)
    sizes = {wanted.shape[0] if wanted.dim() else 0 for wanted, _ in pairs}
    samples = (sizes.pop() or 1) if len(sizes) == 1 else 1
    signal = sum(w.double().square().reshape(samples, -1).sum(1) for w, _ in pairs)
    noise = sum((w.double() - o.double()).square().reshape(samples, -1).sum(1) for w, o in pairs)
    kl, count = _kl(*pairs[0], samples)
    return torch.stack([kl, count, signal, noise], 1).cpu()


def class_axis(logits: Tensor) -> int | None:
    """The axis of the classes, None where there are none."""
    if logits.dim() < 2:
        return None
    axis = 1 if logits.dim() >= 4 else logits.dim() - 1
    return axis if logits.shape[axis] > 1 else None


def mean_kl(sums: Tensor) -> Tensor:
    """KL of a prediction from sums [.., 4]."""
    return sums[..., 0] / sums[..., 1]


def decibel(sums: Tensor) -> Tensor:
    """SQNR in dB from sums [.., 4]; infinite without noise."""
    signal, noise = sums[..., 2], sums[..., 3]
    return torch.where(noise == 0, math.inf, 10 * torch.log10(signal / noise))


def _kl(reference: Tensor, output: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    axis = class_axis(reference)
    if axis is None or reference.shape[0] != samples:
        nothing = torch.full((samples,), math.nan, dtype=torch.float64, device=reference.device)
        return nothing, torch.ones_like(nothing)
    p, q = (logits.double().log_softmax(axis) for logits in (reference, output))
    kl = (p.exp() * (p - q)).sum(axis).reshape(samples, -1)
    return kl.sum(1), torch.full_like(kl[:, 0], kl.shape[1])
