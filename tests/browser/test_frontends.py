"""The dashboard where notebooks are shown by something else than JupyterLab: Notebook 7, and a page made by Voilà."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import NOTEBOOK_7, VOILA, new_notebook, new_page, running_jupyterlab, write_notebook

pytestmark = pytest.mark.browser
SETUP = """
import torch, qlab
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 4)).eval()
batches = [torch.randn(8, 3, 8, 8)]
lab = qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)
lab.select("2")
lab"""


def set_bits(page: Page, bits: int) -> None:
    """By keyboard, in the table, and as the histogram says it."""
    row = page.locator(".qlab-grid tbody tr[data-row='2']")
    row.locator("td").nth(1).click()
    page.keyboard.press(str(bits))
    expect(row.locator("td").nth(1)).to_have_text(str(bits))
    expect(page.locator(".qlab-layers [role=status]", has_text="2 weight")).to_contain_text(f"{bits} bits")


def is_complete(page: Page) -> None:
    """Table, histogram and scores are there."""
    expect(page.locator(".qlab-grid tbody tr").first).to_be_visible(timeout=120_000)
    expect(page.locator(".qlab-layers .qlab-pane").first).to_have_attribute("data-ready", "true")
    expect(page.locator(".qlab-score")).not_to_contain_text("measuring")


@pytest.fixture(scope="module")
def shared_notebook(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    with running_jupyterlab(tmp_path_factory.mktemp("notebook7"), NOTEBOOK_7) as server:
        notebook = new_notebook(chromium, server, [SETUP])
        notebook.command("notebook:run-all-cells")
        yield notebook
        notebook.page.context.close()


def test_notebook_7_shows_it_and_an_edit_is_answered(notebook) -> None:
    is_complete(notebook.page)
    set_bits(notebook.page, 4)
    notebook.eventually("print(lab.sim['2'].weight.bits, lab.step)", "4 1")
    notebook.page.keyboard.press("Control+z")
    notebook.eventually("print(lab.sim['2'].weight.bits, lab.step)", "8 0")


def test_notebook_7_runs_a_technique_from_its_form(notebook) -> None:
    page = notebook.page
    page.get_by_role("tab", name="Techniques").click()
    page.get_by_label("Technique", exact=True).select_option("CrossLayerEqualization")
    expect(page.get_by_label("iterations")).to_have_value("100")
    page.get_by_role("region", name="dashboard").get_by_role("button", name="Run").click()
    expect(page.get_by_text("done after").first).to_be_visible()
    notebook.eventually("print(lab.action)", "CrossLayerEqualization()")


def test_notebook_7_shows_the_same_after_a_reload_and_in_the_dark(notebook) -> None:
    notebook.reload()
    page = notebook.page
    expect(page.get_by_role("tab", name="Techniques")).to_have_attribute("aria-selected", "true", timeout=60_000)
    page.get_by_role("tab", name="Layers").click()
    is_complete(page)
    notebook.theme("Dark")
    background = "getComputedStyle(document.querySelector('.qlab-grid')).backgroundColor"
    page.wait_for_function(f"{background} !== 'rgb(255, 255, 255)'")
    notebook.screenshot("notebook7_dark")
    notebook.theme("Light")


def test_voila_shows_it_and_an_edit_is_answered(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    with running_jupyterlab(tmp_path_factory.mktemp("voila"), VOILA) as server:
        shown = new_page(chromium, server)
        shown.page.goto(server.address(write_notebook(server, [SETUP])), timeout=120_000)
        is_complete(shown.page)
        set_bits(shown.page, 4)
        shown.page.keyboard.press("Control+z")
        row = shown.page.locator(".qlab-grid tbody tr[data-row='2']")
        expect(row.locator("td").nth(1)).to_have_text("8")
        shown.screenshot("voila")
        shown.complain()
        shown.page.context.close()
