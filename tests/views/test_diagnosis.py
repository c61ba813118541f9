"""A diagnosis shows the parts and the cause as they were found; a fix is one step, and undo takes it back."""

import time

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


def wait_for(what):
    """Waits until `what()` is true, ten seconds at most."""
    end = time.monotonic() + 10
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    assert what()


@pytest.mark.parametrize("verb", ["set", "run"])
def test_after_apply_the_true_gain_stands_beside_the_predicted_one(lab, verb):
    if verb == "run":
        with torch.no_grad():  # one channel that fills the grid, which only equalization gives back to the others
            lab.sim.model.get_submodule("0").weight[0] *= 50
        lab.refresh()
        lab.calibrate()
    lab.select("0")
    view = Diagnosis(lab)
    found = view.diagnose().result()
    score = qlab.SQNR(lab.batches)
    before = float(lab.sim.evaluate(score))
    number = next(i for i, fix in enumerate(found.fixes) if fix.verb == verb)
    view._fixes.children[number].children[0].click()
    wait_for(lambda: number in view.measured)
    gain, error = view.measured[number]
    assert gain == pytest.approx(float(lab.sim.evaluate(score)) - before)
    assert gain == pytest.approx(found.fixes[number].predicted_gain, abs=0.01)
    shown = f"predicted, {gain:+.2f} ± {error:.2f} dB measured when done"
    wait_for(lambda: shown in view._fixes.children[number].children[1].value)
    assert shown in view.to_html()
    lab.undo()  # from another state than the one it was predicted for nothing is measured
    lab.set("2", "weight", bits=8)
    view.fix(next(i for i, fix in enumerate(found.fixes) if i != number and fix.verb == "set"))
    assert not any(job.title == "Verify" for job in lab.jobs)
    assert list(view.measured) == [number]
    view.close()


def test_without_a_selection_it_says_what_to_do(lab):
    view = Diagnosis(lab)
    with pytest.raises(ValueError, match="select one"):
        view.diagnose()
    view.close()
