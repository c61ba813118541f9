"""A job through what happens to a notebook: the tab closed and opened, a second kernel, the kernel restarted."""

import urllib.error
import urllib.request

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Server

pytestmark = pytest.mark.browser
MODEL = """
import time, torch, qlab
from dataclasses import dataclass
from torch import nn
from qlab.techniques import Report, Technique
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
batches = [torch.randn(8, 3, 8, 8)]
example = batches[0]

@dataclass(frozen=True)
class Slow(Technique):
    "Waits, and changes a weight meanwhile."

    def run(self, sim, batches, score, progress):
        for step in range(3000):
            progress.step(step, 3000, "waiting")
            next(iter(sim.model.parameters())).data.add_(0.01)
            time.sleep(0.05)
        return Report("Slow", "waited")
"""
LAB = """
sim = qlab.QuantSim(model, example, qlab.presets.w8a8())
lab = qlab.Lab(sim, batches, script_path="steps.py")
lab"""
FIRST_WEIGHT = "print(round(next(iter(sim.model.parameters())).sum().item(), 4))"


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    notebook = open_notebook([MODEL, LAB])
    dashboard_in(notebook.page)
    return notebook


def dashboard_in(page: Page) -> Locator:
    found = page.get_by_role("region", name="dashboard").first
    expect(found.locator(".qlab-grid tbody tr").first).to_be_visible(timeout=120_000)
    return found


def runs(page: Page) -> Locator:
    return dashboard_in(page).get_by_text("of 3000 waiting")


def test_nothing_answers_without_the_token(jupyterlab: Server) -> None:
    assert jupyterlab.url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{jupyterlab.url}/api/contents")


def test_a_job_goes_on_while_the_tab_is_closed_and_is_cancelled_from_the_next(notebook) -> None:
    notebook.py("lab.set('0', 'weight', bits=5)")
    before = notebook.py(FIRST_WEIGHT)
    notebook.py("job = lab.start(Slow())")
    expect(runs(notebook.page)).to_be_visible()
    notebook.command("docmanager:save")
    address = notebook.page.url
    notebook.page.goto("about:blank")
    notebook.page.goto(address)
    notebook.idle()
    expect(runs(notebook.page)).to_be_visible()
    notebook.eventually("print(job.state.value, job.done > 3)", "running True")
    dashboard_in(notebook.page).get_by_role("button", name="Cancel").click()
    expect(dashboard_in(notebook.page).get_by_text("cancelled after")).to_be_visible()
    assert notebook.py(FIRST_WEIGHT) == before
    assert notebook.py("print(lab.step, sim['0'].weight.bits)") == "1 5"


def test_two_kernels_run_their_jobs_side_by_side(notebook, open_notebook) -> None:
    other = open_notebook([MODEL, LAB.replace("steps.py", "other.py")])
    for one in (notebook, other):
        dashboard_in(one.page)
        one.py("job = lab.start(Slow())")
        expect(runs(one.page)).to_be_visible()
    dashboard_in(other.page).get_by_role("button", name="Cancel").click()
    expect(dashboard_in(other.page).get_by_text("cancelled after")).to_be_visible()
    assert notebook.py("print(job.state.value)") == "running"
    notebook.py("job.cancel()")
    expect(dashboard_in(notebook.page).get_by_text("cancelled after")).to_be_visible()
    other.complain()


def test_a_restart_during_a_job_loses_only_the_step_under_way(notebook) -> None:
    notebook.py("lab.set('2', 'weight', bits=3); job = lab.start(Slow())")
    expect(runs(notebook.page)).to_be_visible()
    notebook.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    notebook.idle()
    notebook.py(MODEL)
    notebook.py("get_ipython().run_line_magic('run', '-i steps.py')")
    assert notebook.py("print(sim['0'].weight.bits, sim['2'].weight.bits)") == "5 3"
    shown = notebook.run("lab = qlab.Lab(sim, batches)\nlab")
    expect(shown.locator(".qlab-grid tbody tr").first).to_be_visible(timeout=60_000)
    shown.locator(".qlab-grid tbody tr[data-row='0'] td").nth(1).click()
    notebook.page.keyboard.press("4")
    notebook.eventually("print(sim['0'].weight.bits, lab.step)", "4 1")
