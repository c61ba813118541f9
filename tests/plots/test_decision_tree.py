"""The tree joins each stage to its parent and shows verdicts by word, shape and colour."""

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


def test_each_edge_runs_from_the_parents_box_down_to_the_childs():
    plot = plots.decision_tree(FRAME)
    nodes = pd.DataFrame(dict(plot.source.data)).set_index("stage")
    edges = pd.DataFrame(dict(plot.edges.data))
    parents, children = nodes.loc[["float", "CLE", "CLE"]], nodes.loc[["CLE", "AdaRound", "QAT"]]
    assert edges[["x0", "y0"]].to_numpy() == pytest.approx(parents[["x", "bottom"]].to_numpy())
    assert edges[["x1", "y1"]].to_numpy() == pytest.approx(children[["x", "top"]].to_numpy())
    assert (edges.y0 > edges.y1).all()
    assert nodes.x["AdaRound"] != nodes.x["QAT"]


def test_every_verdict_has_a_shape_of_its_own():
    assert len({shape for shape, _ in VERDICTS.values()}) == len(VERDICTS)
    data = plots.decision_tree(FRAME).source.data
    assert data["text"][3] == "failed"
    assert data["marker"][2] == VERDICTS["target met"][0]


def test_the_best_score_is_that_of_a_kept_stage():
    assert plots.decision_tree(FRAME, target=0.85).headline == "4 stages, best score 0.9, target 0.85"


def test_a_parent_that_is_no_stage_is_named():
    with pytest.raises(ValueError, match="'nowhere'"):
        plots.decision_tree(FRAME.assign(parent=[None, "nowhere", "CLE", "CLE"]))
