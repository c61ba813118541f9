"""The front is what no other configuration beats, and every kind has a shape of its own."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlab import plots
from qlab.plots.pareto import pareto_front

KINDS = ["predicted", "verified", "uniform", "current"]
FRAME = pd.DataFrame({"cost": [1.0, 2.0, 3.0, 2.5], "score": [0.5, 0.8, 0.7, 0.9], "kind": KINDS})


def test_rows_are_held_in_the_order_given():
    data = plots.pareto(FRAME).source.data
    assert data["cost"].tolist() == [1.0, 2.0, 3.0, 2.5]
    assert data["score"].tolist() == [0.5, 0.8, 0.7, 0.9]
    assert data["kind"] == KINDS
    assert len(set(data["marker"])) == 4


def test_the_line_joins_the_front_by_rising_cost():
    plot = plots.pareto(FRAME)
    line = next(renderer for renderer in plot.figure.renderers if type(renderer.glyph).__name__ == "Line")
    assert line.data_source.data["cost"].tolist() == [1.0, 2.0, 2.5]
    assert plot.source.data["on_front"].tolist() == [True, True, False, True]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_nothing_on_the_front_is_beaten_and_everything_else_is(points):
    def is_beaten(cost: int, score: int) -> bool:
        return any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)

    cost, score = np.array(points, dtype=float).T
    front = [points[i] for i in pareto_front(cost, score)]
    assert front == sorted(point for point in set(points) if not is_beaten(*point))


def test_an_unknown_kind_is_refused():
    with pytest.raises(plots.WrongColumns, match="guessed"):
        plots.pareto(FRAME.assign(kind="guessed"))


def test_the_float_score_is_in_view():
    plot = plots.pareto(FRAME, float_score=0.99)
    assert plot.figure.y_range.end > 0.99
    assert "float 0.99" in plot.headline
