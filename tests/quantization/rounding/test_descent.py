"""Coordinate descent: never worse, and at its end no single integer could be changed for the better."""

import pytest
import torch

from qlab.quantization.rounding import coordinate_descent
from tests.quantization.rounding.problems import is_on_grid, rows


@pytest.mark.parametrize("sweeps", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_sweep_is_at_least_as_good(seed, sweeps):
    made = rows(2, 6, 80, seed, reach=0.8)
    start = made.problem.nearest()
    kept = start.clone()
    found = coordinate_descent(made.problem, start, sweeps)
    assert torch.equal(start, kept)
    assert is_on_grid(made.problem, found)
    assert bool((made.error(found) <= made.error(start) * (1 + 1e-12)).all())
    assert float(made.error(found).sum()) < 0.7 * float(made.error(start).sum())


@pytest.mark.parametrize("inputs", [6, 70])  # 70: more than one block of columns
def test_at_the_end_no_single_change_is_better(inputs):
    made = rows(2, 3, inputs, bits=3, reach=0.7)
    problem = made.problem
    found = coordinate_descent(problem, problem.nearest(), sweeps=100)
    least = made.error(found)
    for column in range(inputs):
        for level in range(-4, 4):
            other = found.clone()
            other[..., column] = level
            assert bool((made.error(other) >= least * (1 - 1e-9)).all())
    assert torch.equal(coordinate_descent(problem, found, sweeps=1), found)
