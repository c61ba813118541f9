"""The rounding problem: the points of a grid that come closest to a target, where a metric says how errors add up.

In the metric of second moments, tr(E G E^T) is the mean squared error of a layer's output, and errors of different
inputs can cancel. To nearest is the answer only where G is diagonal.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoundingProblem:
    """Minimise e G e^T over e = scale * levels - target, for each row by itself.

    Shapes: target [B, M, K]; metric G [B, K, K], symmetric and positive definite, or [B, 1, K], its diagonal, where
    nothing but `error` is asked for; scale, low, high broadcast against target. levels are whole numbers as floats:
    integer codes minus the zero point, from low to high.
    """

    target: Tensor
    metric: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def nearest(self, values: Tensor | None = None) -> Tensor:
        """The levels next to `values` (the target, when None) [B, M, K], without regard to the metric."""
        return self.clamp(((self.target if values is None else values) / self.scale).round())

    def floor(self) -> Tensor:
        """The levels at or below the target [B, M, K], where one is on the grid."""
        return self.clamp((self.target / self.scale).floor())

    def clamp(self, levels: Tensor) -> Tensor:
        """`levels` brought into [low, high]."""
        return torch.minimum(torch.maximum(levels, self.low), self.high)

    def error(self, levels: Tensor) -> Tensor:
        """e G e^T of each row [B, M]."""
        e = levels * self.scale - self.target
        is_diagonal = self.metric.shape[1] == 1
        return ((e * self.metric if is_diagonal else e @ self.metric) * e).sum(-1)

    def energy(self) -> Tensor:
        """t G t^T of each row's target [B, M]."""
        return ((self.target @ self.metric) * self.target).sum(-1)

    def scaled(self, factor: Tensor | float) -> "RoundingProblem":
        """The same problem on a grid `factor` times as wide; factor broadcasts against target."""
        return replace(self, scale=self.scale * factor)
