"""AdaRound's soft rounding: between the two neighbours on the grid lies a slope that training can walk.

h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) is how far above the floor a weight is; the regularizer drives it to 0 or 1.
Source: Nagel et al. 2020, arXiv:2004.10568.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_STRETCH, _OFFSET = 1.2, 0.1


@dataclass(frozen=True)
class SoftRounding:
    """The schedule of one run of `steps`: its regularizer starts after `warm_start` of them, beta goes from 20 to 2.

    strength: of the regularizer sum(1 - |2h - 1|^beta).
    """

    steps: int
    strength: float = 0.01
    warm_start: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0

    @staticmethod
    def start(fraction: Tensor) -> Tensor:
        """V with h(V) = fraction, which lies in [0, 1).

        >>> SoftRounding.share(SoftRounding.start(torch.tensor([0.0, 0.25])))
        tensor([0.0000, 0.2500])
        """
        inner = (fraction + _OFFSET) / _STRETCH
        return torch.log(inner / (1 - inner))

    @staticmethod
    def share(v: Tensor) -> Tensor:
        """h(V)."""
        return (torch.sigmoid(v) * _STRETCH - _OFFSET).clamp(0, 1)

    @staticmethod
    def slope(v: Tensor) -> Tensor:
        """dh/dV, 0 where h is clipped."""
        inner = torch.sigmoid(v)
        share = inner * _STRETCH - _OFFSET
        return _STRETCH * inner * (1 - inner) * ((share > 0) & (share < 1))

    def beta(self, step: int) -> float | None:
        """The exponent at a step (counted from 0), None during the warm start."""
        warm = self.warm_start * self.steps
        if step < warm:
            return None
        done = (step - warm) / (self.steps - warm)
        return self.beta_end + 0.5 * (self.beta_start - self.beta_end) * (1 + math.cos(math.pi * done))

    def regularizer(self, share: Tensor, beta: float) -> Tensor:
        """strength * sum(1 - |2h - 1|^beta), differentiable."""
        return self.strength * (1 - (2 * share - 1).abs().pow(beta)).sum()

    def regularizer_slope(self, share: Tensor, beta: float) -> Tensor:
        """The regularizer's derivative by h."""
        centred = 2 * share - 1
        return (-2 * self.strength * beta) * centred.abs().pow(beta - 1) * centred.sign()

    def gradient(self, v: Tensor, share: Tensor, by_share: Tensor, beta: float | None) -> Tensor:
        """The derivative by V of a loss and the regularizer, `by_share` being the loss's derivative by h = h(V)."""
        if beta is not None:
            by_share = by_share + self.regularizer_slope(share, beta)
        return by_share * self.slope(v)
