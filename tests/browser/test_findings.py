"""Findings in a real JupyterLab: Validate, open one, and click through to its layer."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
SETUP = """
import torch, qlab
torch.manual_seed(0)
torch.set_num_threads(1)
digits = qlab.examples.digits()
batches = digits.calibration(2)
hard = qlab.examples.rescale(qlab.examples.mobilenet(), spread=(1 / 30, 30), seed=0)
sim = qlab.QuantSim(hard, digits.test[0], qlab.presets.w8a8())
sim.calibrate(batches)
lab = qlab.Lab(sim, batches)
"""


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    notebook = open_notebook([SETUP, "qlab.views.Findings(lab)"])
    notebook.page.set_viewport_size({"width": 1300, "height": 850})
    notebook.command("application:toggle-left-area")
    return notebook


def test_validate_lists_findings_and_a_click_selects_the_layer(notebook):
    view = notebook.page.get_by_role("region", name="findings").first
    view.get_by_role("button", name="Validate").click()
    expect(view.locator("details").first).to_be_visible(timeout=120_000)
    depthwise = view.locator(".widget-hbox", has_text="QL304").last
    expect(depthwise.locator("p").first).to_be_hidden()
    depthwise.locator("summary").click()
    expect(depthwise.locator("p").first).to_be_visible()
    name = depthwise.get_by_role("button").inner_text().strip()
    depthwise.get_by_role("button").click()
    notebook.idle()
    assert name in notebook.run("lab.selected").inner_text()
    view.evaluate("element => element.scrollIntoView()")
    notebook.screenshot("findings")
    assert view.get_by_role("combobox").evaluate("box => box.selectedOptions[0].textContent") == "all"
    view.get_by_role("combobox").select_option("warnings")
    expect(view.locator("details").first).to_contain_text("warning")
    expect(view.get_by_text("hint:")).to_have_count(0)
