"""The metric's error is that of the outputs, and grids are what they say."""

from dataclasses import replace

import pytest
import torch

from qlab.quantization.rounding import RoundingProblem
from tests.quantization.rounding.problems import rows


@pytest.mark.parametrize("seed", range(3))
def test_the_error_in_the_metric_is_the_squared_difference_of_outputs_row_by_row(seed):
    made = rows(3, 5, 12, seed)
    levels = made.problem.nearest()
    torch.testing.assert_close(made.problem.error(levels), made.error(levels), rtol=1e-10, atol=0)


def test_nearest_and_floor_by_hand_with_an_end_of_the_grid():
    one = torch.ones(1, 1, 1)
    problem = RoundingProblem(
        torch.tensor([[[0.3, -0.3, 0.25, 9.0, -9.0]]]), torch.eye(5)[None], 0.5 * one, -2 * one, 3 * one
    )
    assert problem.nearest().tolist() == [[[1, -1, 0, 3, -2]]]  # 0.25 / 0.5 lies half way: to even
    assert problem.floor().tolist() == [[[0, -1, 0, 3, -2]]]
    assert problem.nearest(torch.full((1, 1, 5), 0.9)).tolist() == [[[2, 2, 2, 2, 2]]]
    assert problem.scaled(2.0).nearest().tolist() == [[[0, 0, 0, 3, -2]]]


def test_a_diagonal_may_stand_for_its_matrix():
    made = rows(2, 3, 6).problem
    energy = torch.diagonal(made.metric, dim1=1, dim2=2)
    whole, short = replace(made, metric=torch.diag_embed(energy)), replace(made, metric=energy[:, None])
    torch.testing.assert_close(short.error(made.nearest()), whole.error(made.nearest()))
