"""The width of a grid: the best of those tried, for all rows that share it."""

import pytest
import torch

from qlab.quantization.rounding import RoundingProblem, search_scale
from tests.quantization.rounding.problems import rows

FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@pytest.mark.parametrize("sharing", ["one for all", "one a row", "one a group"])
def test_the_factor_is_the_best_of_those_given_for_each_owner(sharing):
    made = rows(2, 3, 16, bits=3)
    count = {"one for all": 1, "one a row": 6, "one a group": 2}[sharing]
    owner = (torch.arange(6) * count // 6).view(2, 3)
    found = search_scale(made.problem, owner, lambda p: p.nearest(), factors=FACTORS)
    errors = []
    for factor in FACTORS:
        tried = made.problem.scaled(factor)
        wrong = (made.x @ (tried.target - tried.nearest() * tried.scale).transpose(1, 2)).square().mean(1)
        errors.append([float(wrong[owner == index].sum()) for index in range(count)])
    wanted = [FACTORS[min(range(len(FACTORS)), key=lambda f: errors[f][index])] for index in range(count)]
    assert found.tolist() == pytest.approx(wanted)
    assert found.min() < 1  # there was something to find


def test_a_scale_that_fits_stays_and_of_equal_ones_the_widest():
    one = torch.ones(1, 1, 1)
    exact = RoundingProblem(torch.tensor([[[7.0, -3.0, 1.0]]]), torch.eye(3)[None], one, -8 * one, 7 * one)
    assert search_scale(exact, torch.zeros(1, 1, dtype=torch.int64), lambda p: p.nearest()).tolist() == [1.0]
    nothing = RoundingProblem(torch.zeros(1, 1, 3), torch.eye(3)[None], one, -8 * one, 7 * one)
    assert search_scale(nothing, torch.zeros(1, 1, dtype=torch.int64), lambda p: p.nearest()).tolist() == [1.0]


def test_at_two_bits_a_long_tail_asks_for_a_grid_far_narrower_than_the_range():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 1, 400, generator=generator)
    target[..., 0] = 12.0
    one = torch.ones(1, 1, 1)
    problem = RoundingProblem(target, torch.eye(400)[None], one * 12, -2 * one, one)
    owner = torch.zeros(1, 1, dtype=torch.int64)
    found = float(search_scale(problem, owner, lambda p: p.nearest(), bits=2))
    assert found < 0.25
    scaled = problem.scaled(found)
    assert float(scaled.error(scaled.nearest())) < 0.8 * float(problem.error(problem.nearest()))
