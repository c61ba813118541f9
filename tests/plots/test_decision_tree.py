"""The tree joins each stage to its parent and shows verdicts by word, shape and colour."""

import re

import numpy as np
import pandas as pd
import pytest

from qlab import plots
from qlab.plots.decision_tree import VERDICTS

FRAME = pd.DataFrame(
    [
        ("float", None, 0.99, "", True),
        ("CLE", "float", 0.8, "effective", True),
        ("AdaRound", "CLE", 0.9, "target met", True),
        ("QAT", "CLE", np.nan, "failed", False),
    ],
    columns=["stage", "parent", "score", "verdict", "is_best"],
)


def test_stages_hold_the_given_numbers_in_order():
    data = plots.decision_tree(FRAME).source.data
    assert data["stage"] == ["float", "CLE", "AdaRound", "QAT"]
    assert np.array_equal(data["score"], FRAME["score"], equal_nan=True)


def test_each_edge_runs_down_from_the_parents_box_and_across_to_the_childs():
    plot = plots.decision_tree(FRAME)
    nodes = pd.DataFrame(dict(plot.source.data)).set_index("stage")
    edges = pd.DataFrame(dict(plot.edges.data))
    down, across = edges.iloc[:3].reset_index(), edges.iloc[3:].reset_index()
    for i, (parent, child) in enumerate([("CLE", "QAT"), ("float", "CLE"), ("CLE", "AdaRound")]):  # the best on top
        assert down.y0[i] == pytest.approx(nodes.bottom[parent])
        assert nodes.left[parent] < down.x0[i] == down.x1[i] == across.x0[i] < nodes.left[child]
        assert down.y1[i] == across.y0[i] == across.y1[i] == nodes.y[child]
        assert across.x1[i] == nodes.left[child]
    assert list(edges.color == plots.theme.ORANGE) == [False, True, True] * 2


def test_children_stand_under_their_parent_and_before_what_comes_after_it():
    frame = pd.DataFrame({"stage": list("abcdef"), "parent": [None, "a", "a", "b", None, "c"], "score": 0.0})
    nodes = pd.DataFrame(dict(plots.decision_tree(frame.assign(verdict="effective")).source.data)).set_index("stage")
    assert nodes.y.sort_values(ascending=False).index.tolist() == ["a", "b", "d", "c", "f", "e"]
    assert (nodes.left.rank(method="dense") - 1).astype(int).to_dict() == dict(
        zip("abcdef", (0, 1, 1, 2, 0, 2), strict=True)
    )
    assert (nodes.top.sort_values().to_numpy()[:-1] < nodes.bottom.sort_values().to_numpy()[1:]).all()  # no overlap


def test_every_verdict_has_a_shape_of_its_own():
    assert len({shape for shape, _ in VERDICTS.values()}) == len(VERDICTS)
    data = plots.decision_tree(FRAME).source.data
    assert data["text"][3] == "failed"
    assert data["marker"][2] == VERDICTS["target met"][0]


def test_the_static_picture_puts_words_where_the_live_one_does():
    picture = plots.decision_tree(FRAME).to_svg()
    name, verdict = (re.search(rf"<text ([^>]*)>{words}<", picture)[1] for words in ("AdaRound", r"0\.9000 target met"))
    assert "text-anchor" not in name  # from the mark to the right
    assert 'text-anchor="end"' in verdict
    left, right = (float(re.search(r'x="([\d.]+)"', place)[1]) for place in (name, verdict))
    assert left < 120 < 600 < right


def test_the_best_score_is_that_of_a_kept_stage():
    assert plots.decision_tree(FRAME, target=0.85).headline == "4 stages, best score 0.9, target 0.85"


def test_a_parent_that_is_no_stage_is_named():
    with pytest.raises(ValueError, match="'nowhere'"):
        plots.decision_tree(FRAME.assign(parent=[None, "nowhere", "CLE", "CLE"]))
