"""Standard errors and rank correlations against textbook formulas and SciPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qlab.analysis.precision import difference, jackknife, ranks, spearman, stability


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def rows_of(values):
    return torch.stack([torch.as_tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.float64)], 1)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_jackknife_of_a_mean_is_its_standard_error(values):
    centre, error = jackknife(mean, rows_of(values))
    assert centre == pytest.approx(np.mean(values), abs=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)


def test_the_jackknife_of_a_ratio_is_close_to_what_resampling_gives():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(400, 2, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.5])
    _, error = jackknife(lambda s: 10 * torch.log10(s[..., 0] / s[..., 1]), rows)
    picks = torch.randint(400, (4000, 400), generator=generator)
    drawn = rows[picks].sum(1)
    assert error == pytest.approx(float((10 * torch.log10(drawn[:, 0] / drawn[:, 1])).std()), rel=0.05)


def test_one_sample_and_infinite_values_have_no_error():
    assert math.isnan(jackknife(mean, rows_of([1.0]))[1])
    assert math.isnan(jackknife(lambda s: s[..., 0] / 0, rows_of([1.0, 2.0]))[1])


def test_a_difference_is_paired_by_sample():
    a, b = np.array([1.0, 0, 1, 1, 0, 1]), np.array([1.0, 0, 0, 1, 0, 1])
    value, error = difference(mean, rows_of(a), rows_of(b))
    assert value == pytest.approx(1 / 6)
    assert error == pytest.approx(np.std(a - b, ddof=1) / math.sqrt(6))
    assert error < math.hypot(*(np.std(side, ddof=1) / math.sqrt(6) for side in (a, b)))


def test_no_change_among_n_samples_is_not_certain():
    same = rows_of([1.0, 0, 1, 1])
    assert difference(mean, same, same) == (0.0, pytest.approx(1 / 6))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_ranks_and_spearman_are_those_of_scipy(pairs):
    a, b = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    assert (ranks(a) + 1).tolist() == stats.rankdata(a).tolist()
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    else:
        assert math.isnan(spearman(a, b))


def test_pairs_without_a_number_are_left_out():
    nan = math.nan
    assert spearman(np.array([1.0, nan, 2, 3]), np.array([1.0, 5, 2, nan])) != 1  # two pairs are too few
    assert spearman(np.array([1.0, nan, 2, 3]), np.array([2.0, 5, 4, 9])) == 1


def test_a_ranking_is_stable_with_clear_differences_and_not_with_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 50, generator=generator, dtype=torch.float64)
    ones = torch.ones_like(noise)
    clear = torch.stack([noise + 10.0 * torch.arange(8).double()[:, None], ones], 2)
    assert stability(mean, clear) == 1.0
    assert stability(mean, torch.stack([noise, ones], 2)) < 0.8
