"""Bars arrive while the analysis runs and are those of the analysis at the end; a click selects."""

import math
import sys

import pytest
import torch
from torch import nn

import qlab
from qlab import QuantAnalyzer
from qlab.views import Sensitivity


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(16, 6)]
    return qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)


def drawn(view: Sensitivity) -> dict[str, float]:
    data = view._figure.source.data
    return dict(zip(data["layer"], data["score"], strict=True))


def test_rows_are_drawn_before_the_analysis_ends(lab):
    view, seen = Sensitivity(lab), []
    view._drawn = float("-inf")
    lab.events.job_published.connect(lambda job, record: seen.append((job.state.value, len(view._rows))))
    view.measure().result()
    assert seen[0] == ("running", 1)
    assert seen[-1][1] == len({row.key for row in view._rows.values()})
    view.close()


def test_bars_are_the_scores_of_the_analysis_with_the_widths_typed(lab):
    view = Sensitivity(lab)
    view._bits.value = "4"
    analysis = view.measure().result()
    assert view.analysis is analysis
    assert analysis.bits == ("4",)
    for mode in ("enabled", "disabled"):
        view._mode.value = mode
        table = analysis.table(mode)
        assert drawn(view) == pytest.approx(dict(zip(table.layer, table.score, strict=True)), nan_ok=True)
    view.close()


def test_a_click_selects(lab):
    view = Sensitivity(lab)
    view.measure().result()
    place = list(view._figure.source.data["layer"]).index("2")
    view._figure.source.selected.indices = [place]
    assert lab.selected == ("2",)
    view.close()


def settled(lab):
    """Wait for the jobs that an edit started."""
    while lab.jobs:
        lab.jobs[-1].result()


def test_after_an_edit_one_bar_is_measured_again_and_the_others_hold(lab):
    view, other = Sensitivity(lab), Sensitivity(lab)
    view.measure().result()
    before, titles = drawn(view), []
    lab.events.job_started.connect(lambda job: titles.append(job.title))
    lab.set("2", "weight", bits=3)
    settled(lab)
    assert titles == ["Update"]  # one, though two views show it
    after, fresh = drawn(view), lab.run(QuantAnalyzer(estimate=False))
    assert after["2"] != before["2"]
    assert {name: score for name, score in after.items() if name != "2"} == {
        name: score for name, score in before.items() if name != "2"
    }
    assert after == drawn(other) == dict(zip(fresh.enabled.layer, fresh.enabled.score, strict=True))
    view.close()
    other.close()


def test_a_bar_of_an_earlier_state_says_so_and_undo_makes_it_true_again(lab, monkeypatch):
    monkeypatch.setattr(sys.modules[Sensitivity.__module__], "QUICK_S", 0.0)
    view = Sensitivity(lab)
    view.measure().result()
    lab.set("2", "weight", bits=3)
    assert not lab.jobs
    assert "Of an earlier state: 2." in view._said.value
    assert (view._renew.layout.display, view._renew.description) == ("", "Update 2")
    data = view._figure.source.data
    notes = dict(zip(data["layer"], data["note"], strict=True))
    assert notes["2"] == "of an earlier state"
    assert not any(note for name, note in notes.items() if name != "2")
    view._mode.value = "disabled"
    assert "Measured in an earlier state." in view._said.value
    view._mode.value = "enabled"
    lab.undo()
    assert "earlier" not in view._said.value
    assert view._renew.layout.display == "none"
    lab.redo()
    view._renew.click()
    settled(lab)
    assert "Brought up to date" in view._said.value
    assert "earlier" not in view._said.value
    view.close()


def test_after_a_technique_nothing_holds(lab):
    view = Sensitivity(lab)
    view.measure().result()
    lab.run(qlab.CrossLayerEqualization())
    assert "Measured in an earlier state." in view._said.value
    assert not lab.jobs
    view.close()


def test_a_layer_that_is_switched_off_has_no_bar_and_gets_it_back(lab):
    view = Sensitivity(lab)
    view.measure().result()
    before = drawn(view)
    with_both = [part for part in ("weight", "output") if getattr(lab.sim["2"], part) is not None]
    for part in with_both:
        lab.set("2", part, enabled=False)
        settled(lab)
    rows = view.analysis.enabled.set_index("layer")
    assert rows.note["2"] == "switched off"
    assert math.isnan(rows.score["2"])
    for part in with_both:
        lab.set("2", part, enabled=True)
        settled(lab)
    assert drawn(view) == before
    view.close()


def test_a_cancelled_analysis_leaves_what_it_found(lab):
    view = Sensitivity(lab)
    lab.events.job_published.connect(lambda job, record: job.cancel())
    with pytest.raises(qlab.errors.Cancelled):
        view.measure().result()
    assert "Cancelled" in view._said.value
    assert view._rows
    assert view.analysis is None
    view.close()
