"""AdaRound on second moments: its gradient, where it ends, and how far from the best rounding."""

from itertools import product

import pytest
import torch

from qlab.quantization.rounding import SoftRounding, relax
from qlab.quantization.rounding.relaxation import relaxed_gradient, relaxed_loss
from tests.quantization.rounding.problems import is_on_grid, rows


@pytest.mark.parametrize("beta", [None, 12.0, 3.0])
@pytest.mark.parametrize("reach", [1.0, 0.6])
def test_the_gradient_is_that_of_finite_differences(reach, beta):
    made, soft = rows(2, 3, 5, bits=3, reach=reach), SoftRounding(10)
    problem, floor = made.problem, made.problem.floor()
    v = SoftRounding.start((problem.target / problem.scale - floor).clamp(0.02, 0.9))
    found, step = relaxed_gradient(problem, soft, v, floor, beta), 1e-6
    for place in product(*map(range, v.shape)):
        ahead, behind = v.clone(), v.clone()
        ahead[place] += step
        behind[place] -= step
        losses = [relaxed_loss(problem, soft, w, floor, beta) for w in (ahead, behind)]
        assert float(found[place]) == pytest.approx(float(losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-7)


def test_the_data_term_of_the_loss_is_the_reconstruction_error_of_all_rows():
    made, soft = rows(2, 3, 7), SoftRounding(10)
    floor = made.problem.floor()
    share = torch.rand(floor.shape, dtype=torch.float64)
    loss = relaxed_loss(made.problem, soft, SoftRounding.start(share), floor, None)
    clipped = torch.minimum(floor + share, made.problem.high)
    torch.testing.assert_close(loss, made.error(clipped).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("reach", [1.0, 0.5])
def test_it_ends_on_the_grid_at_the_floor_or_one_above_the_same_each_time(reach):
    problem = rows(2, 4, 20, reach=reach, dtype=torch.float32).problem
    steps: list[int] = []
    levels = relax(problem, SoftRounding(200), each=steps.append)
    assert is_on_grid(problem, levels)
    above = levels - problem.floor()
    assert bool(((above == 0) | (above == 1)).all())
    assert 0 < float(above.mean()) < 1
    assert steps == list(range(200))
    assert torch.equal(relax(problem, SoftRounding(200)), levels)


def test_it_comes_closer_than_rounding_to_nearest_in_every_problem():
    for seed in range(4):
        made = rows(1, 8, 24, seed)
        levels = relax(made.problem, SoftRounding(500))
        assert float(made.error(levels).sum()) < 0.7 * float(made.error(made.problem.nearest()).sum())
