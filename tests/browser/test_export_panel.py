"""The Export tab in a real JupyterLab: files, the target's word beside the sim's, others' encodings."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
SETUP = """
import tempfile, torch, qlab
torch.manual_seed(0)
torch.set_num_threads(1)
digits = qlab.examples.digits()
batches = digits.calibration(2)
sim = qlab.QuantSim(qlab.examples.resnet(), batches[0], qlab.presets.onnxruntime())
qlab.BatchNormFolding().apply(sim)
sim.calibrate(batches)
lab = qlab.Lab(sim, batches, score=qlab.Accuracy(digits.test[:2]))
folder = tempfile.mkdtemp()
view = qlab.views.Export(lab, folder + "/resnet")
"""
LONG_MS = 120_000  # an export on a busy machine


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    notebook = open_notebook([SETUP, "view"])
    notebook.page.get_by_role("button", name="Check on target").wait_for(timeout=LONG_MS)
    notebook.idle()
    return notebook


def test_export_check_and_compare_by_mouse(notebook):
    page = notebook.page
    page.locator(".jupyter-button", has_text="Export").click()
    expect(page.get_by_text("4 files written.")).to_be_visible(timeout=LONG_MS)
    expect(page.get_by_role("cell", name="resnet.float.onnx")).to_be_visible()
    page.get_by_role("checkbox", name="every layer").check()
    page.get_by_role("button", name="Check on target").click()
    expect(page.get_by_text("of the integers are the sim's")).to_be_visible(timeout=LONG_MS)
    expect(page.get_by_role("cell", name="accuracy", exact=True)).to_be_visible()
    assert float(notebook.py("print(view.checked.identical)")) >= 0.95
    notebook.py("lab.set('conv1', 'weight', bits=4)")
    expect(page.get_by_text("The sim changed since.")).to_be_visible()
    page.get_by_role("textbox", name="other").fill(notebook.py("print(folder)") + "/resnet.encodings")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("1 are not.")).to_be_visible(timeout=LONG_MS)
    expect(page.get_by_role("cell", name="conv1 (weight)")).to_be_visible()


def test_an_export_that_is_not_there_is_said_in_the_panel(notebook):
    page = notebook.page
    page.get_by_role("textbox", name="path").fill("/nowhere/model")
    page.get_by_role("button", name="Check on target").click()
    expect(page.get_by_role("alert")).to_contain_text("there is no file", timeout=LONG_MS)
