"""Training curves hold every step, and scores only where they were measured."""

import numpy as np
import pandas as pd

from qlab import plots


def test_scores_are_drawn_where_they_were_measured():
    frame = pd.DataFrame({"step": [0, 1, 2], "loss": [3.0, 2.0, 1.0], "score": [np.nan, 0.5, 0.8]})
    plot = plots.training(frame, float_score=0.9)
    assert plot.steps.data["loss"].tolist() == [3.0, 2.0, 1.0]
    assert plot.scores.data["step"].tolist() == [1.0, 2.0]
    assert plot.scores.data["score"].tolist() == [0.5, 0.8]
    assert plot.headline == "step 2: loss 1, best score 0.8 (float 0.9)"


def test_the_second_axis_comes_with_the_first_score():
    frame = pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]})
    plot = plots.training(frame)
    assert not plot.figure.yaxis[1].visible
    plot.update(frame.assign(score=[0.1, 0.2]))
    assert plot.figure.yaxis[1].visible


def test_a_zoom_stays_while_the_extent_does_and_follows_new_steps():
    frame = pd.DataFrame({"step": [0, 10], "loss": [2.0, 1.0]})
    plot = plots.training(frame)
    plot.figure.x_range.update(start=4.0, end=5.0)  # what a person does in the browser
    plot.update(frame)
    assert plot.figure.x_range.start == 4.0
    plot.update(frame.assign(step=[0, 20]))
    assert plot.figure.x_range.end > 20


def test_a_range_and_its_clipped_share_in_percent():
    frame = pd.DataFrame({"step": [0, 1], "low": [-1.0, -0.5], "high": [1.0, 0.5], "clipped": [0.0, 0.02]})
    plot = plots.range_history(frame, name="fc")
    assert plot.steps.data["clipped"].tolist() == [0.0, 2.0]
    assert plot.headline == "fc: range [-0.5, 0.5], clips 2 % at step 1"
