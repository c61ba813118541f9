"""GPTQ: round column after column, each time moving what remains to make up for the error so far.

Written as Babai's nearest plane: with G = R R^T, R upper triangular, e G e^T is a sum of squares of which the k-th
knows only the errors of columns up to k. Frantar et al. 2023, arXiv:2210.17323 (there through the inverse of G, with
the same result); Babai 1986.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.quantization.rounding.problem import RoundingProblem

_BLOCK = 64  # columns between two matrix products; inside a block errors are passed on one by one


@dataclass(frozen=True, eq=False)
class Factor:
    """Columns in decreasing order of G's diagonal, `order` [B, K], and upper triangular R [B, K, K] of G so ordered."""

    order: Tensor
    triangle: Tensor


def factor_metric(metric: Tensor) -> Factor:
    """The factor of a positive definite metric [B, K, K]; computed in float64, kept in the metric's dtype."""
    order = torch.diagonal(metric, dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    ordered = metric.gather(1, order[:, :, None].expand_as(metric)).gather(2, order[:, None, :].expand_as(metric))
    lower = torch.linalg.cholesky(ordered.double().flip(1, 2))
    return Factor(order, lower.flip(1, 2).to(metric.dtype))


def nearest_plane(problem: RoundingProblem, factor: Factor) -> Tensor:
    """Levels [B, M, K], rounded in the factor's order."""
    order, triangle = factor.order, factor.triangle
    batch, rows, columns = problem.target.shape

    def ordered(value: Tensor) -> Tensor:  # [B, K, M]: a column is contiguous
        wide = value.expand(batch, rows, columns).transpose(1, 2)
        return wide.gather(1, order[:, :, None].expand(batch, columns, rows))

    target, scale, low, high = map(ordered, (problem.target, problem.scale, problem.low, problem.high))
    levels, error = torch.empty_like(target), torch.empty_like(target)
    pivot = torch.diagonal(triangle, dim1=1, dim2=2)[:, :, None]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        carried = triangle[:, :start, start:stop].transpose(1, 2) @ error[:, :start]  # [B, block, M]
        for k in range(start, stop):
            shift = carried[:, k - start]
            if k > start:
                shift = shift + (triangle[:, None, start:k, k] @ error[:, start:k])[:, 0]
            wanted = (target[:, k] - shift / pivot[:, k]) / scale[:, k]
            levels[:, k] = torch.minimum(torch.maximum(wanted.round_(), low[:, k]), high[:, k])
            error[:, k] = levels[:, k] * scale[:, k] - target[:, k]
    found = torch.empty_like(levels).scatter_(1, order[:, :, None].expand_as(levels), levels)
    return found.transpose(1, 2).contiguous()
