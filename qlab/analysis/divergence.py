"""How far a result is from the float model's, sample by sample: SQNR and KL beside every score, at no extra forward.

A score such as accuracy hardly moves when one layer is quantized; these two do.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qlab.sim.evaluate import float_tensors

COLUMNS = 4  # kl, predictions, signal, noise


class Divergence:
    """Compares results with one reference result, whose own part is computed once."""

    def __init__(self, reference: Any) -> None:
        self._tensors = float_tensors(reference)
        self._wide = [tensor.double() for tensor in self._tensors]
        sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in self._tensors}
        self._samples = (sizes.pop() or 1) if len(sizes) == 1 else 1
        self._signal = sum(wide.square().reshape(self._samples, -1).sum(1) for wide in self._wide)
        first = self._tensors[0] if self._tensors else torch.zeros(())
        self._axis = class_axis(first) if first.dim() and first.shape[0] == self._samples else None
        self._log_p = None if self._axis is None else self._wide[0].log_softmax(self._axis)

    def rows(self, output: Any) -> Tensor:
        """(KL summed over predictions, predictions, signal, noise) of each sample, float64 [samples, 4].

        KL(softmax(reference) || softmax(output)) in nats over the classes of the first float tensor (axis 1 of images,
        else the last), NaN where there are no classes. Signal and noise are sums of squares over all float tensors.
        """
        outputs = [tensor.double() for tensor in float_tensors(output)]
        if not self._tensors:
            return torch.zeros(0, COLUMNS, dtype=torch.float64)
        pairs = zip(self._wide, outputs, strict=True)
        noise = sum((wanted - found).square().reshape(self._samples, -1).sum(1) for wanted, found in pairs)
        kl, count = self._kl(outputs[0])
        return torch.stack([kl, count, self._signal, noise], 1).cpu()

    def _kl(self, output: Tensor) -> tuple[Tensor, Tensor]:
        if self._log_p is None or self._axis is None:
            nothing = torch.full((self._samples,), math.nan, dtype=torch.float64, device=output.device)
            return nothing, torch.ones_like(nothing)
        kl = (self._log_p.exp() * (self._log_p - output.log_softmax(self._axis))).sum(self._axis)
        kl = kl.reshape(self._samples, -1)
        return kl.sum(1), torch.full_like(kl[:, 0], kl.shape[1])


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
