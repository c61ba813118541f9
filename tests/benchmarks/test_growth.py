"""Capture, calibration, analysis and the dashboard grow with the number of layers and not with its square: counted.

What is counted are calls of functions, Python's and C's; benchmarks/growth.py measures seconds and memory.
"""

import cProfile
from collections.abc import Callable

import pytest

from benchmarks.growth import Chain, exponent, exponents, picture

SIZES = (16, 32, 64)


def calls(work: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(work)
    return sum(entry.callcount for entry in profile.getstats())


def is_linear(small: int, middle: int, large: int) -> bool:
    """Of work for sizes n, 2n and 4n: what is done once cancels out; a square part of 3 % at n would fail."""
    return large - middle <= 2.15 * (middle - small)


@pytest.fixture(scope="module")
def counts() -> dict[str, list[int]]:
    for work in Chain(8).stages.values():  # what is imported or built once
        work()
    chains = [Chain(size) for size in SIZES]
    return {name: [calls(chain.stages[name]) for chain in chains] for name in chains[0].stages}


@pytest.mark.parametrize("stage", list(Chain(4).stages))
def test_twice_the_layers_is_twice_the_calls(counts, stage):
    small, middle, large = counts[stage]
    assert small < middle < large
    assert is_linear(small, middle, large), counts[stage]


def test_the_count_would_notice_a_square():
    def work(size: int) -> int:
        return calls(lambda: [abs(i) for _ in range(size) for i in range(size // 16)] + [len("x") for _ in range(size)])

    assert not is_linear(*map(work, SIZES))
    assert is_linear(*(calls(lambda size=size: [abs(i) for i in range(size)]) for size in SIZES))


def test_exponents_and_picture_of_known_times():
    found = {
        str(n): {"line": {"seconds": n / 100, "MiB": 1.0}, "square": {"seconds": n * n / 1e4, "MiB": 1.0}}
        for n in (20, 100, 200, 400)
    }
    assert exponent([10, 20, 40], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert exponents(found) == pytest.approx({"line": 1.0, "square": 2.0})
    drawn = picture(found)
    assert "line, n^1.00" in drawn
    assert "square, n^2.00" in drawn
    assert drawn.count("<circle") == 8
