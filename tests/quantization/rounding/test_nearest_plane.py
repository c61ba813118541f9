"""Nearest plane against GPTQ as its paper writes it, and where the metric leaves nothing to choose."""

from dataclasses import replace

import pytest
import torch

from qlab.quantization.rounding import factor_metric, nearest_plane
from tests.quantization.rounding.problems import Rows, is_on_grid, rows


def gptq(made: Rows, group: int) -> torch.Tensor:
    """Algorithm 1 of arXiv:2210.17323 without blocks: the Cholesky factor of the inverse of G, column by column."""
    p = made.problem
    order = torch.diagonal(p.metric[group]).argsort(descending=True)
    inverse = torch.linalg.inv(p.metric[group][order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    weight, levels = p.target[group][:, order].clone(), torch.empty_like(p.target[group])
    scale, low, high = float(p.scale[group]), float(p.low[group]), float(p.high[group])
    for j in range(weight.shape[1]):
        column = (weight[:, j] / scale).round().clamp(low, high)
        levels[:, order[j]] = column
        error = (weight[:, j] - column * scale) / upper[j, j]
        weight[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return levels


@pytest.mark.parametrize(("inputs", "reach"), [(5, 1.0), (100, 1.0), (100, 0.5)])  # 100: more than one block
def test_it_gives_the_integers_of_gptq(inputs, reach):
    made = rows(2, 4, inputs, reach=reach)
    levels = nearest_plane(made.problem, factor_metric(made.problem.metric))
    assert is_on_grid(made.problem, levels)
    for group in range(2):
        assert torch.equal(levels[group], gptq(made, group))
    assert float(made.error(levels).sum()) < float(made.error(made.problem.nearest()).sum())


def test_a_diagonal_metric_leaves_rounding_to_nearest():
    problem = rows(1, 4, 30).problem
    diagonal = replace(problem, metric=torch.diag_embed(torch.rand(1, 30, dtype=torch.float64) + 0.1))
    assert torch.equal(nearest_plane(diagonal, factor_metric(diagonal.metric)), diagonal.nearest())


def test_the_factor_gives_the_ordered_metric_back():
    metric = rows(2, 1, 20).problem.metric
    factor = factor_metric(metric)
    for group in range(2):
        order, upper = factor.order[group], factor.triangle[group]
        assert torch.equal(upper, upper.triu())
        torch.testing.assert_close(upper @ upper.t(), metric[group][order][:, order], rtol=1e-9, atol=1e-9)
        assert bool((torch.diagonal(metric[group])[order].diff() <= 0).all())
