"""The guidebook in a real JupyterLab: a network at chance, and back, by clicks."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

CELLS = [
    """
import torch, qlab
torch.set_num_threads(1)
digits = qlab.examples.digits()
hard = qlab.examples.rescale(qlab.examples.mobilenet(), spread=(1 / 30, 30), seed=0)
sim = qlab.QuantSim(hard, digits.test[0], qlab.presets.w8a8())
lab = qlab.Lab(sim, digits.calibration(2), score=qlab.Accuracy(digits.test[:2]))
guide = qlab.guidebook(lab)
""",
    "guide",
]
PATH = ["Is the pipeline sound?", "Weights or activations?", "Do channels of weights differ?"]


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    notebook = open_notebook(CELLS)
    notebook.page.get_by_text("Nothing was looked at yet.").wait_for(timeout=120_000)
    notebook.idle()
    return notebook


def test_clicks_lead_from_chance_to_the_goal(notebook):
    view = notebook.output(1)
    run = view.get_by_role("button", name="Run")
    for title in PATH:
        expect(view.locator("select").first.locator("option:checked")).to_have_text(title)
        run.click()
        expect(view.locator(".qlab-report p b").first).to_have_text(title, timeout=60_000)
    notebook.screenshot("guidebook_remedies")
    view.get_by_role("button", name="Apply").first.click()
    expect(view.get_by_text("The sim changed since the last step.")).to_be_visible(timeout=60_000)
    run.click()
    expect(view.get_by_text("The goal is reached").first).to_be_visible(timeout=60_000)
    assert notebook.py("print(lab.step, guide.findings[-1].key)") == "1 verdict"


def test_looking_at_a_layer_draws_it(notebook):
    view = notebook.output(1)
    view.locator("select").first.select_option(label="What is wrong with it?")
    view.get_by_role("button", name="Run").click()
    expect(view.locator(".qlab-pane[data-ready]").first).to_be_visible(timeout=60_000)
    assert notebook.py("print(lab.selected == (guide.findings[-1].layer,))") == "True"
    notebook.screenshot("guidebook_layer")
