"""Every published step of a training is in the curves, the range of the selected layer with it; a person steers."""

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import InputError
from qlab.views import Training


@pytest.fixture
def lab(monkeypatch) -> qlab.Lab:
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(4)]
    return qlab.Lab(qlab.QuantSim(model, batches[0][0], qlab.presets.w8a8()), batches)


def at_epoch(lab: qlab.Lab, epoch: int, action) -> None:
    """Do something once, in the job's thread, when that epoch ends."""
    done: list[int] = []

    def look(_job, record) -> None:
        if record.score is not None and record.epoch + 1 == epoch and not done:
            done.append(epoch)
            action()

    lab.events.job_published.connect(look)


def test_steps_stream_in_and_are_all_drawn(lab):
    view, published = Training(lab), []
    lab.events.job_published.connect(lambda job, record: published.append((job.state.value, len(view.steps))))
    lab.start(qlab.QAT(epochs=2, follow="1")).result()
    assert published[0] == ("running", 1)
    assert view.steps[-1].step == 8
    assert view.steps[-1].score is not None
    assert len(view.steps) == len(published)
    assert len(view._curves.steps.data["step"]) == sum(step.score is None for step in view.steps)
    assert len(view._curves.scores.data["step"]) == 2
    assert len(view._range.steps.data["low"]) == sum(step.layer == "1" for step in view.steps) > 0
    assert view.range.layout.display is None
    assert "QAT: 2 epochs" in view._said.value
    view.close()


def test_the_range_is_that_of_the_layer_selected_meanwhile(lab):
    view = Training(lab)
    lab.select("1")
    at_epoch(lab, 2, lambda: lab.select("2"))
    lab.start(qlab.QAT(epochs=4)).result()
    followed = [step.layer for step in view.steps if step.layer is not None]
    assert followed[0] == "1"
    assert followed[-1] == "2"
    assert "2 output" in view._range.headline
    assert len(view._range.steps.data["low"]) == followed.count("2")
    assert 0 <= view._range.steps.data["clipped"][-1] < 100
    assert view.range.to_html() in view.to_html()
    view.close()


def test_the_selected_layer_is_frozen_and_given_other_bits_before_the_next_epoch(lab):
    view = Training(lab)
    lab.select("2")
    with pytest.raises(InputError, match="no training runs"):
        view.freeze()
    assert all(widget.disabled for widget in (*view._buttons, *view._bits.values()))

    def steer() -> None:
        assert not any(widget.disabled for widget in (*view._buttons, *view._bits.values()))
        view._bits["weight"].value = 4
        view._buttons[0].click()
        view._buttons[1].click()
        assert view._waiting.value.count("2: ") == 2

    at_epoch(lab, 1, steer)
    lab.start(qlab.QAT(epochs=3)).result()
    assert lab.sim["2"].weight.bits == 4
    assert lab.sim["2"].output.bits == 8
    assert "edits=((2, '2', 'weight.bits', 4), (2, '2', 'frozen', True))" in lab.script()
    assert "Before" not in view._waiting.value
    lab.undo()
    assert lab.sim["2"].weight.bits == 8
    view.close()
