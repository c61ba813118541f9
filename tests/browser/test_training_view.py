"""A training seen and steered in a real browser: curves stream in, a layer is frozen and given other bits meanwhile."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
FREEZE = re.compile("Freeze$")  # an icon stands before the word
MODEL = """
import threading, time, torch, qlab
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(12)]
lab = qlab.Lab(qlab.QuantSim(model, batches[0][0], qlab.presets.w8a8()), batches)
lab.select("2")
go_on = threading.Event()
def wait(sim, epoch):
    if epoch == 2:
        go_on.wait(120)
"""
VIEW = "view = qlab.views.Training(lab)\nview"


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    return open_notebook([MODEL, VIEW])


def test_curves_stream_in_and_a_person_steers_the_next_epoch(notebook) -> None:
    view = notebook.output(1)
    expect(view.get_by_text("No training yet")).to_be_visible()
    expect(view.get_by_role("button", name=FREEZE)).to_be_disabled()
    notebook.py("job = lab.start(qlab.QAT(epochs=4, between_epochs=wait))")
    notebook.eventually("print(job.state.value, len(view._curves.scores.data['step']))", "running 2")
    expect(view.get_by_text("epoch 2, step")).to_be_visible()
    expect(view.locator(".bk-Canvas, canvas").first).to_be_visible()
    view.get_by_role("spinbutton", name="weight bits").fill("4")
    view.get_by_role("button", name="Set bits").click()
    view.get_by_role("button", name=FREEZE).click()
    expect(view.get_by_text("Before the next epoch: ")).to_contain_text("weight bits 4")
    notebook.screenshot("training-steered", view)
    notebook.py("go_on.set()")
    expect(view.get_by_text("QAT: 4 epochs")).to_be_visible()
    expect(view.get_by_role("button", name=FREEZE)).to_be_disabled()
    assert notebook.py("print(lab.sim['2'].weight.bits)") == "4"
    assert notebook.py("print(sorted({s.layer for s in view.steps if s.layer}))") == "['2']"
    assert notebook.py("print([round(s.loss, 4) > 0 for s in view.steps if s.score is not None])").count("True") == 4
    notebook.screenshot("training-done", view)
