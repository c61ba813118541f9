"""Rounding problems made of rows of inputs, so that every error can be computed from the rows themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.quantization.rounding import RoundingProblem


@dataclass(frozen=True)
class Rows:
    """A problem, and the rows of inputs [B, n, K] whose second moments are its metric."""

    problem: RoundingProblem
    x: Tensor

    def error(self, levels: Tensor) -> Tensor:
        """The mean squared difference of the outputs of target and levels [B, M], row by row."""
        p = self.problem
        exact = self.x @ p.target.transpose(1, 2)
        rounded = self.x @ (levels * p.scale).transpose(1, 2)
        return (exact - rounded).square().mean(1)


def rows(
    batch: int, outputs: int, inputs: int, seed: int = 0, bits: int = 4, reach: float = 1.0, dtype=torch.float64
) -> Rows:
    """Correlated inputs, as a network has them; the grid covers `reach` of the largest target."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(batch, inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, 4 * inputs + 8, inputs, generator=generator, dtype=torch.float64) @ mixing + 0.5
    target = torch.randn(batch, outputs, inputs, generator=generator, dtype=torch.float64)
    high = 2 ** (bits - 1) - 1
    scale = (target.abs().amax((1, 2), keepdim=True) * reach / high).to(dtype)
    limits = torch.full_like(scale, -high - 1), torch.full_like(scale, high)
    metric = x.transpose(1, 2) @ x / x.shape[1]
    return Rows(RoundingProblem(target.to(dtype), metric.to(dtype), scale, *limits), x.to(dtype))


def is_on_grid(problem: RoundingProblem, levels: Tensor) -> bool:
    """Whether every level is a whole number within the grid."""
    inside = (levels >= problem.low) & (levels <= problem.high)
    return levels.shape == problem.target.shape and bool(inside.all()) and bool((levels == levels.round()).all())
