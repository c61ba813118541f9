"""A diagnosis shows the parts and the cause as they were found; a fix is one step, and undo takes it back."""

import pytest
import torch
from torch import nn

import qlab
from qlab.views import Diagnosis


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(64, 6)]
    return qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w4a8()), batches)


def test_it_shows_what_was_found_and_fixes_can_be_undone(lab):
    lab.select("0")
    view = Diagnosis(lab)
    found = view.diagnose().result()
    assert found.layer == "0"
    assert view.diagnosis is found
    assert found.cause.split(":")[0] in view._found.value
    assert len(view._fixes.children) == min(len(found.fixes), 8) > 0
    number = next(i for i, fix in enumerate(found.fixes) if fix.verb == "set")
    arguments = dict(found.fixes[number].arguments)
    quantizer = getattr(lab.sim[arguments.pop("layers")], arguments.pop("part"))
    before = quantizer.spec, quantizer.enabled
    view._fixes.children[number].children[0].click()
    assert lab.step == 1
    assert (quantizer.spec, quantizer.enabled) != before
    assert "earlier state" in view._said.value
    lab.undo()
    assert (quantizer.spec, quantizer.enabled) == before
    assert "earlier state" not in view._said.value
    view.close()


def test_without_a_selection_it_says_what_to_do(lab):
    view = Diagnosis(lab)
    with pytest.raises(ValueError, match="select one"):
        view.diagnose()
    view.close()
