"""How sure a number is: standard errors by the jackknife, of one state and of the difference between two.

Two states of a model are scored on the same samples, so what most samples share cancels: the error of the difference is
that of the few samples that changed, often several times smaller than the error of either score.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Value = Callable[[Tensor], Tensor]  # sums [.., k] to [..]


def jackknife(value: Value, rows: Tensor) -> tuple[float, float]:
    """(value, standard error) of rows [samples, k]; the error is NaN for one sample or an infinite value."""
    total = rows.sum(0)
    centre = float(value(total))
    if len(rows) < 2 or not math.isfinite(centre):
        return centre, math.nan
    return centre, _spread(value(total - rows))


def difference(value: Value, rows: Tensor, baseline: Tensor) -> tuple[float, float]:
    """(value(rows) - value(baseline), its standard error), both measured on the same samples in the same order.

    Where not one of n samples of a share (rows of right and counted) changed, that is no proof that none does: half a
    sample is counted as changed each way, which makes the error 1 / (n + 2) (Agresti and Min 2005,
    doi.org/10.1002/sim.1781).
    """
    total, base = rows.sum(0), baseline.sum(0)
    centre = float(value(total) - value(base))
    if len(rows) < 2 or not math.isfinite(centre):
        return (centre if math.isfinite(centre) else math.nan), math.nan
    error = _spread(value(total - rows) - value(base - baseline))
    if error == 0 and rows.shape[1] == 2 and float(total[1]) > 0:
        error = 1 / (float(total[1]) + 2)
    return centre, error


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, equal values sharing their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    return below + (equal - 1) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of the pairs that are numbers; NaN for fewer than three or without variation.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0]))
    0.5
    """
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 3:
        return math.nan
    x, y = (ranks(np.asarray(side, dtype=float)[both]) for side in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else math.nan


def stability(value: Value, rows: Tensor, draws: int = 100, seed: int = 0) -> float:
    """How alike the ranking of rows [cases, samples, k] would be on other samples: the 5th percentile, over bootstrap
    draws of the samples, of Spearman's correlation with the ranking of all of them."""
    generator = torch.Generator().manual_seed(seed)
    samples = rows.shape[1]
    picks = torch.randint(samples, (draws, samples), generator=generator)
    weights = torch.zeros(draws, samples, dtype=rows.dtype).scatter_add_(
        1, picks, torch.ones_like(picks).to(rows.dtype)
    )
    drawn = value(torch.einsum("ds,csk->dck", weights, rows)).numpy()
    whole = value(rows.sum(1)).numpy()
    found = [spearman(draw, whole) for draw in drawn]
    return float(np.nanquantile(found, 0.05)) if not np.isnan(found).all() else math.nan


def _spread(left: Tensor) -> float:
    n = len(left)
    if not bool(torch.isfinite(left).all()):
        return math.nan
    return math.sqrt((n - 1) / n * float((left - left.mean()).square().sum()))
