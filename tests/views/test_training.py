"""Every published step of a training is in the curves, the followed range with it."""

import torch
from torch import nn

import qlab
from qlab.views import Training


def test_steps_stream_in_and_are_all_drawn(monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(4)]
    sim = qlab.QuantSim(model, batches[0][0], qlab.presets.w8a8())
    sim.calibrate([x for x, _ in batches])
    lab = qlab.Lab(sim, batches)
    view, published = Training(lab), []
    lab.events.job_published.connect(lambda job, record: published.append((job.state.value, len(view.steps))))
    lab.start(qlab.QAT(epochs=2, follow="1")).result()
    assert published[0] == ("running", 1)
    assert view.steps[-1].step == 8
    assert view.steps[-1].score is not None
    assert len(view._curves.steps.data["step"]) == len(view.steps) == len(published)
    assert len(view._range.steps.data["low"]) == sum(step.layer == "1" for step in view.steps) > 0
    assert view.range.layout.display is None
    view.close()
