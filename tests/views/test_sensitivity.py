"""Bars arrive while the analysis runs and are those of the analysis at the end; a click selects."""

import pytest
import torch
from torch import nn

import qlab
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


def test_a_click_selects_and_an_edit_makes_it_old(lab):
    view = Sensitivity(lab)
    view.measure().result()
    place = list(view._figure.source.data["layer"]).index("2")
    view._figure.source.selected.indices = [place]
    assert lab.selected == ("2",)
    assert "earlier" not in view._said.value
    lab.set("2", "weight", bits=4)
    assert "earlier" in view._said.value
    lab.undo()
    assert "earlier" not in view._said.value
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
