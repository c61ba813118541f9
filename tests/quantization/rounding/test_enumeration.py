"""Enumeration against a loop over every rounding in plain Python."""

from itertools import product

import pytest
import torch

from qlab.quantization.rounding import RoundingProblem, coordinate_descent, enumerate_roundings, nearest_plane
from qlab.quantization.rounding import factor_metric as factor
from tests.quantization.rounding.problems import is_on_grid, rows


@pytest.mark.parametrize(("inputs", "reach"), [(1, 1.0), (4, 1.0), (4, 0.4), (7, 0.8)])
def test_no_rounding_up_or_down_is_better(inputs, reach):
    made = rows(2, 3, inputs, seed=inputs, bits=3, reach=reach)
    problem, floor = made.problem, made.problem.floor()
    best = torch.full((2, 3), torch.inf, dtype=torch.float64)
    for choice in product((0.0, 1.0), repeat=inputs):
        levels = floor + torch.tensor(choice, dtype=torch.float64)
        error = made.error(levels)
        on_grid = (levels <= problem.high).all(-1)
        best = torch.where(on_grid & (error < best), error, best)
    found = enumerate_roundings(problem)
    assert is_on_grid(problem, found)
    torch.testing.assert_close(made.error(found), best, rtol=1e-9, atol=1e-15)


def test_the_other_searches_of_one_step_are_never_better_and_descent_only_by_going_further():
    for seed in range(5):
        made = rows(4, 4, 9, seed)
        problem = made.problem
        levels = enumerate_roundings(problem)
        for other in (problem.nearest(), nearest_plane(problem, factor(problem.metric))):
            step = other - problem.floor()
            within = ((step == 0) | (step == 1)).all(-1)
            assert not bool((within & (made.error(other) < made.error(levels) * (1 - 1e-9))).any())
        further = coordinate_descent(problem, levels)
        better = made.error(further) < made.error(levels) * (1 - 1e-9)
        step = further - problem.floor()
        assert bool((~better | ~((step == 0) | (step == 1)).all(-1)).all())


def test_many_small_problems_do_not_depend_on_how_they_are_divided(monkeypatch):
    problem = rows(40, 1, 9).problem
    whole = enumerate_roundings(problem)
    monkeypatch.setattr("qlab.quantization.rounding.enumeration._ENTRIES", 3 * 512 * 9)
    assert torch.equal(enumerate_roundings(problem), whole)


def test_ten_inputs_are_refused():
    one = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match=r"2\^10"):
        enumerate_roundings(RoundingProblem(torch.zeros(1, 1, 10), torch.eye(10)[None], one, -one, one))
