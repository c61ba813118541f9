"""The wizard runs the step that is offered, shows what it found, and a remedy is one step that undo takes back."""

import dataclasses

import pytest
import torch
from torch import nn

import qlab
from qlab.lab.guidebook_steps import STEPS
from qlab.views import Guidebook


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    batches = [torch.randn(64, 6)]
    hard = qlab.examples.rescale(model, spread=(1e-3, 1e3), seed=0)
    return qlab.Lab(qlab.QuantSim(hard, batches[0], qlab.presets.w8a8()), batches)


def run(view: Guidebook) -> None:
    view._run.click()
    view._job.result()


def test_each_click_goes_one_step_further_and_shows_it(lab):
    view = Guidebook(lab)
    for title in ("Is the pipeline sound?", "Weights or activations?", "Do channels of weights differ?"):
        assert view._choice.label == title
        run(view)
        assert title in view._found.value
        assert view.guide.findings[-1].conclusion.split(":")[0] in view._found.value
    assert "2 earlier" in view._past.value
    view.close()


def test_a_remedy_is_one_step_that_undo_takes_back_and_the_next_step_sees_the_goal(lab):
    view = Guidebook(lab)
    for _ in range(3):
        run(view)
    view.apply(0).result()
    assert lab.step == 1
    assert "changed since" in view._why.value
    lab.undo()
    assert "changed since" not in view._why.value
    lab.redo()
    run(view)
    assert "The goal is reached" in view._found.value
    assert "at its end" in view._why.value
    assert len(view._remedies.children) == 0
    view.close()


def test_a_step_can_be_chosen_and_its_layer_is_selected_and_drawn(lab):
    view = Guidebook(lab)
    view._choice.value = "look"
    run(view)
    layer = view.guide.findings[-1].layer
    assert lab.selected == (layer,)
    assert view._picture is not None
    assert view._place.children == (view._picture,)
    view.close()


def test_steps_run_in_a_cell_appear(lab):
    view = Guidebook(lab)
    view.guide.step()
    assert "16 bits everywhere" in view._found.value
    view.close()


def test_what_went_wrong_is_shown(lab, monkeypatch):
    def fail(bench):
        raise ArithmeticError("no number")

    monkeypatch.setitem(STEPS, "sanity", dataclasses.replace(STEPS["sanity"], examine=fail))
    view = Guidebook(lab)
    view._run.click()
    with pytest.raises(ArithmeticError):
        view._job.result()
    assert "no number" in view.frame.text
    assert view.guide.offered.key == "sanity"
    view.close()


def test_a_guide_at_its_end_can_be_shown(lab):
    guide = qlab.guidebook(lab)
    guide.step("verdict")
    assert guide.offered is None
    view = Guidebook(lab, guide)
    assert "at its end" in view._why.value
    view.close()
