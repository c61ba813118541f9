"""Soft rounding against its definition in the paper and against finite differences."""

import itertools

import pytest
import torch

from qlab.quantization.rounding import SoftRounding

POINTS = torch.linspace(-4, 4, 81, dtype=torch.float64)
STEP = 1e-6


def test_the_share_is_a_stretched_sigmoid_that_reaches_0_and_1():
    wanted = [min(max(1.2 / (1 + 2.718281828459045**-v) - 0.1, 0), 1) for v in POINTS.tolist()]
    assert SoftRounding.share(POINTS).tolist() == pytest.approx(wanted, abs=1e-12)
    assert SoftRounding.share(torch.tensor([-3.0, 3.0])).tolist() == [0, 1]


def test_it_starts_at_the_fraction():
    fraction = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(SoftRounding.share(SoftRounding.start(fraction)), fraction, rtol=0, atol=1e-12)


def test_the_slope_is_that_of_the_share():
    numeric = (SoftRounding.share(POINTS + STEP) - SoftRounding.share(POINTS - STEP)) / (2 * STEP)
    torch.testing.assert_close(SoftRounding.slope(POINTS), numeric, rtol=1e-6, atol=1e-9)
    assert float(SoftRounding.slope(torch.tensor(-3.0))) == 0


@pytest.mark.parametrize("beta", [20.0, 7.5, 2.0])
def test_the_regularizer_and_its_slope(beta):
    soft, share = SoftRounding(10, strength=0.3), torch.linspace(0.01, 0.99, 40, dtype=torch.float64)
    by_hand = sum(0.3 * (1 - abs(2 * h - 1) ** beta) for h in share.tolist())
    assert float(soft.regularizer(share, beta)) == pytest.approx(by_hand)
    each = torch.stack([soft.regularizer(h + STEP, beta) - soft.regularizer(h - STEP, beta) for h in share])
    torch.testing.assert_close(soft.regularizer_slope(share, beta), each / (2 * STEP), rtol=1e-5, atol=1e-7)
    assert float(soft.regularizer(torch.tensor([0.0, 1.0]), beta)) == 0


def test_beta_waits_and_then_falls_from_20_to_2_by_a_cosine():
    soft = SoftRounding(1000)
    betas = [soft.beta(step) for step in range(1000)]
    assert betas[:200] == [None] * 200
    rest = betas[200:]
    assert rest[0] == 20
    assert rest[400] == pytest.approx(11)  # half way down the cosine
    assert rest[-1] == pytest.approx(2, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(rest))
