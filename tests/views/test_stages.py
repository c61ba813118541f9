"""AutoQuant in view: every stage in the table and the tree while it runs, and a person's word in it."""

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import InputError
from qlab.settings import SettingError
from qlab.views import Stages
from tests.techniques.models import lived

TECHNIQUES = "CrossLayerEqualization, BiasCorrection"


@pytest.fixture
def lab(monkeypatch) -> qlab.Lab:
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    batches = [torch.randn(16, 2, 6, 6) for _ in range(2)]
    sim = qlab.QuantSim(qlab.examples.rescale(lived(model), (0.03, 30.0)), batches[0], qlab.presets.w4a8())
    return qlab.Lab(sim, batches, score=qlab.SQNR(batches))


def at_stage(lab: qlab.Lab, stage: str, verdict: str, action) -> None:
    """Do something when a stage is published with that verdict."""

    def look(_job, record) -> None:
        if (record.stage, record.verdict) == (stage, verdict):
            action()

    lab.events.job_published.connect(look)


def shown(view: Stages) -> dict[str, str]:
    data = view._figure.source.data
    return dict(zip(data["stage"], data["verdict"], strict=True))


def test_every_stage_is_shown_while_it_runs_and_the_lab_goes_on_with_the_best(lab):
    view, seen = Stages(lab), []
    view._techniques.value = TECHNIQUES
    lab.events.job_published.connect(lambda *_: seen.append(shown(view)))
    view.find().result()
    assert any(verdicts.get("BatchNormFolding") == "running" for verdicts in seen)
    assert len(seen[3]) < len(shown(view))
    assert shown(view) == dict(zip(view.result.stages.stage, view.result.stages.verdict, strict=True))
    assert view._table.value.count("<tr") == len(view.records) + 1
    assert view._table.value.count("<b>") == len(view.result.lineage)
    assert view.result.summary.split(";")[0] in view._said.value
    assert lab.step == 1
    assert float(lab.sim.evaluate(lab.score)) == pytest.approx(view.result.best.score)
    view.find().result()  # again: the stages of the first search are gone
    assert set(shown(view)) == set(view.result.stages.stage)
    view.close()


def test_a_click_names_a_stage_which_is_then_vetoed_or_forced(lab):
    view = Stages(lab)
    view._techniques.value = TECHNIQUES
    with pytest.raises(InputError, match="no AutoQuant runs"):
        view.veto()
    assert view._veto.disabled

    def steer() -> None:
        assert not view._veto.disabled
        names = list(view._figure.source.data["stage"])
        view._figure.source.selected.indices = [names.index("mse / min_max")]
        assert view._stage.value == "mse / min_max"
        view._force.click()
        view._stage.value = "BiasCorrection"
        view._veto.click()

    at_stage(lab, "mse / mse", "running", steer)
    view.find().result()
    verdicts = shown(view)
    assert "mse / min_max" in view.result.lineage
    assert {verdicts[name] for name in verdicts if "BiasCorrection" in name} == {"vetoed"}
    assert "force=('mse / min_max',)" in lab.script()
    assert view._veto.disabled
    view.close()


def test_cancel_goes_on_with_the_best_so_far(lab):
    view = Stages(lab)
    at_stage(lab, "CrossLayerEqualization", "running", lambda: view._cancel.click())
    view.find().result()
    assert view.result.cancelled
    assert lab.step == 1
    assert "max_stages=" in lab.script()
    assert "cancelled" in view._said.value
    view.close()


def test_what_is_refused_is_shown_and_nothing_starts(lab, monkeypatch):
    view = Stages(lab)
    for field, text in ((view._drop, "little"), (view._drop, "-1"), (view._techniques, "AdaRond")):
        before, field.value = field.value, text
        with pytest.raises(SettingError):
            view.find().result()
        field.value = before
    assert lab.step == 0
    monkeypatch.delenv("QLAB_STRICT")
    view._drop.value = "little"
    view._start.click()
    assert "must be a number" in view.frame.text
    view.close()
