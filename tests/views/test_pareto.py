"""A click on a point of the front is one step with that point's bits; undo and the script know it."""

import pytest
import torch
from torch import nn

import qlab
from qlab.views import Pareto


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(32, 6)]
    return qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)


def bits(lab) -> dict[str, int]:
    return {name: lab.sim[name].weight.bits for name in ("0", "2")}


def test_a_click_applies_a_point_as_one_step(lab):
    view = Pareto(lab)
    front = view.find().result()
    assert lab.step == 0
    assert bits(lab) == {"0": 8, "2": 8}
    assert len(view._figure.source.data["cost"]) == len(front.points)
    number = next(i for i, p in enumerate(front.points) if set(p.configuration.values()) == {4})
    view._figure.source.selected.indices = [number]
    lab.jobs and lab.jobs[0].result()
    assert bits(lab) == {"0": 4, "2": 4}
    assert lab.step == 1
    assert "_ChosenBits" in lab.script()
    assert "earlier state" in view._said.value
    lab.undo()
    assert bits(lab) == {"0": 8, "2": 8}
    view.close()
