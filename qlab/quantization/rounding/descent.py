"""Coordinate descent: move one integer at a time to where the others want it. Monotone, and needs no factorization.

Sources: COMQ (Zhang et al. 2024, arXiv:2403.07134), QuantEase (Behdin et al. 2023, arXiv:2309.01885).
"""

import torch
from torch import Tensor

from qlab.quantization.rounding.problem import RoundingProblem

_BLOCK = 64


def coordinate_descent(problem: RoundingProblem, levels: Tensor, sweeps: int = 3) -> Tensor:
    """Levels [B, M, K] whose error is at most that of `levels`; ends early once nothing moves.

    With e the error and R = e G, column j is best at e_j - R_j / G_jj; its change is passed on to R.
    """
    batch, rows, columns = problem.target.shape

    def turned(value: Tensor) -> Tensor:  # [B, K, M]: a column is contiguous
        return value.expand(batch, rows, columns).transpose(1, 2).contiguous()

    metric = problem.metric
    target, scale, low, high = map(turned, (problem.target, problem.scale, problem.low, problem.high))
    found = turned(levels).clone()
    diagonal = torch.diagonal(metric, dim1=1, dim2=2)[:, :, None]
    residual = metric @ (found * scale - target)
    for _ in range(sweeps):
        moved = False
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            change = torch.zeros_like(found[:, start:stop])
            for k in range(start, stop):
                wanted = found[:, k] - residual[:, k] / (diagonal[:, k] * scale[:, k])
                better = torch.minimum(torch.maximum(wanted.round_(), low[:, k]), high[:, k])
                step = (better - found[:, k]) * scale[:, k]
                if not bool(step.any()):
                    continue
                found[:, k] = better
                change[:, k - start] = step
                residual[:, start:stop].baddbmm_(metric[:, start:stop, k, None], step[:, None])
            if bool(change.any()):
                moved = True
                residual[:, :start].baddbmm_(metric[:, :start, start:stop], change)
                residual[:, stop:].baddbmm_(metric[:, stop:, start:stop], change)
        if not moved:
            break
    return found.transpose(1, 2).contiguous()
