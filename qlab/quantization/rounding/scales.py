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
    ones = torch.ones(int(owner.max()) + 1, dtype=problem.scale.dtype, device=owner.device)
    return best_factors(lambda tried: scale_errors(problem, owner, round_, tried), ones, bits, factors)


def scale_errors(
    problem: RoundingProblem, owner: Tensor, round_: Callable[[RoundingProblem], Tensor], tried: Tensor
) -> Tensor:
    """The error of each owner's rows for each of its factors tried [n, owners], in float64, of the same shape."""
    found = torch.zeros_like(tried, dtype=torch.float64)
    for candidate, total in zip(tried, found, strict=True):
        scaled = problem.scaled(candidate[owner][..., None])
        total.index_add_(0, owner.flatten(), scaled.error(round_(scaled)).double().flatten())
    return found


def best_factors(
    errors: Callable[[Tensor], Tensor], ones: Tensor, bits: int = 4, factors: tuple[float, ...] | None = None
) -> Tensor:
    """`search_scale` where errors(factors tried [n, owners]) are computed elsewhere; ones [owners]."""
    best, chosen = torch.full_like(ones, torch.inf, dtype=torch.float64), ones

    def attempt(tried: Tensor) -> None:
        nonlocal best, chosen
        for candidate, total in zip(tried, errors(tried), strict=True):
            # A float's worth of noise must not narrow a grid for nothing.
            better = total < best * (1 - 1e-6)
            best, chosen = torch.where(better, total, best), torch.where(better, candidate, chosen)

    attempt(torch.stack([ones * factor for factor in factors or _COARSE[: 11 if bits < 4 else 8]]))
    if factors is None:
        attempt(torch.stack([chosen * factor for factor in _FINE]))
    return chosen
