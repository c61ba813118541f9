"""Every way to round a few weights up or down, scored exactly: what small depthwise kernels are worth."""

import torch
from torch import Tensor

from qlab.quantization.rounding.problem import RoundingProblem

MAX_ENUMERATED = 9  # a 3x3 kernel: 512 choices
_ENTRIES = 1 << 23  # of a temporary tensor at once


def enumerate_roundings(problem: RoundingProblem) -> Tensor:
    """The levels [B, M, K] of least error among all 2^K roundings of the target up or down; K at most 9.

    With base e0 = floor - target and steps c in {0, 1}^K times the scale:
    (e0 + s c) G (e0 + s c)^T = e0 G e0^T + 2 s (e0 G) c^T + s^2 c G c^T; steps off the grid are ruled out. The first
    of equal choices is taken.
    """
    batch, rows, columns = problem.target.shape
    if columns > MAX_ENUMERATED:
        raise ValueError(f"2^{columns} roundings are too many to enumerate; at most 2^{MAX_ENUMERATED} are.")
    bits = torch.arange(2**columns, device=problem.target.device)
    choices = ((bits[:, None] >> torch.arange(columns, device=bits.device)) & 1).to(problem.target.dtype)
    scale = problem.scale.expand_as(problem.target)
    floor = problem.floor()
    full = (floor >= problem.high).to(floor.dtype)
    picked = torch.empty(batch, rows, dtype=torch.int64, device=bits.device)
    high = max(1, min(rows, _ENTRIES // choices.numel()))
    wide = max(1, _ENTRIES // (choices.numel() * high))
    for start in range(0, batch, wide):
        for top in range(0, rows, high):
            part = slice(start, start + wide), slice(top, top + high)
            metric, size = problem.metric[part[0]], scale[part]
            gradient = (floor[part] * size - problem.target[part]) @ metric
            steps = choices * size[:, :, None]  # [b, m, choices, K]
            cost = ((steps @ metric[:, None]) * steps).sum(-1) + 2 * (steps @ gradient[..., None])[..., 0]
            picked[part] = cost.masked_fill((full[part] @ choices.t()) > 0, torch.inf).argmin(-1)
    return floor + choices[picked]
