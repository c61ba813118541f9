"""How wide a grid should be for the outputs' sake: tried out, with the rounding that each width allows.

A narrower grid clips large weights and rounds all others more finely. What that is worth only the metric knows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlab.quantization.rounding.problem import RoundingProblem

_COARSE = tuple(0.85**i for i in range(11))  # 1 down to 0.2: at 2 bits a grid wants to be far narrower than the range
_FINE = (0.92, 0.96, 1.04, 1.08)


def search_scale(
    problem: RoundingProblem,
    owner: Tensor,
    round_: Callable[[RoundingProblem], Tensor],
    bits: int = 4,
    factors: tuple[float, ...] | None = None,
) -> Tensor:
    """The factor of the scale with the least error for each owner [owners]; of equal ones the widest grid.

    owner: which rows share a factor, [B, M] of whole numbers from 0. round_: the levels for one width. Tries 8 factors
    (11 below 4 bits), then 4 around the best; or `factors` alone where given.
    """
    count = int(owner.max()) + 1
    best = torch.full((count,), torch.inf, dtype=torch.float64, device=owner.device)
    chosen = torch.ones(count, dtype=problem.scale.dtype, device=owner.device)

    def attempt(candidate: Tensor) -> None:
        nonlocal best, chosen
        tried = problem.scaled(candidate[owner][..., None])
        error = tried.error(round_(tried)).double()
        total = torch.zeros_like(best).index_add_(0, owner.flatten(), error.flatten())
        # A float's worth of noise must not narrow a grid for nothing.
        better = total < best * (1 - 1e-6)
        best, chosen = torch.where(better, total, best), torch.where(better, candidate, chosen)

    for factor in factors or _COARSE[: 11 if bits < 4 else 8]:
        attempt(torch.full_like(chosen, factor))
    if factors is None:
        coarse = chosen
        for factor in _FINE:
            attempt(coarse * factor)
    return chosen
