"""Statistics do not depend on the order of batches, merge exactly, and refuse what has no range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.errors import NonFiniteData
from qlab.quantization import Statistics
from qlab.quantization.statistics import BINS


def equal(a: Statistics, b: Statistics) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("minimum", "maximum", "counts", "first", "exponent"))


def seen(batches, axis, per_channel):
    statistics = Statistics(axis, per_channel)
    for batch in batches:
        statistics.update(batch)
    return statistics


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
    st.sampled_from([(None, False), (0, False), (1, True), (2, True), (-1, True)]),
    st.randoms(),
)
def test_the_order_of_batches_does_not_matter_for_any_axis(seed, scales, mode, random):
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(4, 5, 6, generator=generator) * scale + torch.randn((), generator=generator) * scale
        for scale in scales
    ]
    shuffled = random.sample(batches, len(batches))
    assert equal(seen(batches, *mode), seen(shuffled, *mode))


@pytest.mark.parametrize("mode", [(None, False), (1, False), (1, True)])
def test_merging_workers_equals_seeing_everything(mode):
    batches = [torch.randn(4, 5, 6) * scale for scale in (1, 30, 0.01, 4)]
    left, right = seen(batches[:1], *mode), seen(batches[1:], *mode)
    left.merge(right)
    assert equal(left, seen(batches, *mode))


def test_counts_are_those_of_a_histogram_over_the_same_bins():
    x = torch.randn(3, 1000) * 5
    statistics = seen([x[:1], x[1:]], None, False)
    width = 2.0 ** int(statistics.exponent)
    edges = (statistics.first.double() + torch.arange(BINS + 1).double()) * width
    want = torch.histogram(x.double().flatten(), edges)[0]  # its last bin includes the right edge, never hit here
    assert torch.equal(statistics.counts[0].double(), want)
    span = float(x.max() - x.min())
    assert span / BINS <= width < 4 * span / BINS


def test_a_large_tensor_is_counted_by_an_even_sample_but_ranged_by_every_value():
    x = torch.randn(40, 16, 64, 64)
    x[7, 3, 5, 9] = 123.0
    statistics = seen([x], 1, False)
    assert float(statistics.maximum.max()) == 123.0
    counted = int(statistics.counts.sum())
    assert 30_000 < counted < 70_000
    sample = statistics.sample()
    mean = float((sample.values * sample.counts).sum() / counted)
    assert abs(mean) < 0.02


def test_a_constant_tensor_and_zeros_have_statistics():
    for value in (0.0, 3.3, -1e-20):
        statistics = seen([torch.full((7,), value)], None, False)
        assert float(statistics.minimum) == pytest.approx(value)
        assert int(statistics.counts.sum()) == 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    x = torch.randn(2, 3, 4)
    x[0, 1, 2] = bad
    for axis in (None, 1):
        with pytest.raises(NonFiniteData):
            seen([x], axis, False)


def test_attention_masks_are_left_out_of_the_range():
    x = torch.randn(2, 3, 4)
    masked = x.clone()
    masked[:, :, 0] = torch.finfo(torch.float32).min
    statistics = seen([masked], None, False)
    assert float(statistics.minimum) == float(x[:, :, 1:].min())
    assert statistics.masked == 6


def test_a_copy_is_independent():
    statistics = seen([torch.randn(10)], None, False)
    twin = statistics.copy()
    twin.update(torch.randn(10) * 100)
    assert int(statistics.counts.sum()) == 10
