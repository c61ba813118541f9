"""The analyzer in a real JupyterLab: bars while it runs, a click, an edit that renews one bar, a diagnosis, its fix."""

import pytest
from playwright.sync_api import Locator, expect

pytestmark = pytest.mark.browser
SETUP = """
import torch, qlab
torch.manual_seed(0)
torch.set_num_threads(1)
digits = qlab.examples.digits()
model = qlab.examples.rescale(qlab.examples.mobilenet(), (0.06, 16.0), fold=True)
batches = digits.calibration(2)
sim = qlab.QuantSim(model, batches[0], qlab.presets.w8a8())
sim.calibrate(batches)
lab = qlab.Lab(sim, batches)
bars = qlab.views.Sensitivity(lab)
why = qlab.views.Diagnosis(lab)
"""
COUNT = "len({row.key for row in bars._rows.values()})"


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    notebook = open_notebook([SETUP, "bars", "why"])
    notebook.page.get_by_role("button", name="Measure").wait_for(timeout=120_000)
    notebook.idle()
    return notebook


@pytest.fixture
def bars(notebook) -> Locator:
    return notebook.page.get_by_role("region", name="sensitivity").first


@pytest.fixture
def why(notebook) -> Locator:
    return notebook.page.get_by_role("region", name="diagnosis").first


def test_bars_grow_and_a_click_selects_everywhere(notebook, bars):
    bars.get_by_role("button", name="Measure").click()
    expect(bars).to_contain_text("Measuring.", timeout=30_000)
    notebook.screenshot("sensitivity_growing", bars)
    expect(bars).to_contain_text("Measured: SQNR [dB]", timeout=60_000)
    notebook.screenshot("sensitivity", bars)
    pane = bars.locator(".qlab-pane")
    pane.click(position={"x": 450, "y": 35})  # the first bar
    notebook.eventually("print(lab.selected == (bars.analysis.ranking()[0],))", "True")
    expect(notebook.page.get_by_role("region", name="diagnosis").first).to_contain_text("selected: ")


def test_an_edit_renews_one_bar(notebook, bars):
    before = notebook.py("print(bars.analysis.enabled.score.tolist())")
    notebook.py("lab.set(lab.selected[0], 'weight', granularity='per_channel')")
    expect(bars).to_contain_text("Brought up to date", timeout=60_000)
    after = notebook.py("print(bars.analysis.enabled.score.tolist())")
    changed = [a != b for a, b in zip(eval(before), eval(after), strict=True)]
    assert sum(changed) == 1
    notebook.screenshot("sensitivity_renewed", bars)
    notebook.py("lab.undo()")


def test_a_diagnosis_names_the_cause_and_a_button_heals(notebook, why):
    notebook.py("lab.select('blocks.1.depthwise.conv')")
    why.scroll_into_view_if_needed()
    why.get_by_role("button", name="Diagnose").click()
    expect(why).to_contain_text("range spread of depthwise channels", timeout=90_000)
    notebook.screenshot("diagnosis", why)
    why.get_by_role("button", name="Apply").first.click()
    notebook.eventually("print(lab.step)", "1")
    expect(why).to_contain_text("of an earlier state", timeout=60_000)
    expect(why).to_contain_text("dB measured when done", timeout=60_000)
    notebook.screenshot("diagnosis_applied", why)
