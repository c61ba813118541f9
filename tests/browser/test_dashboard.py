"""The tour in a real JupyterLab: a layer set to 2 bits with mouse and with keyboard moves histogram and scores."""

import json
import re

import nbformat
import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import REPOSITORY

pytestmark = pytest.mark.browser
COLUMNS = ("name", "title", "weight_bits", "weight_granularity", "weight_enabled", "weight_sqnr", "output_bits")
DASHBOARD = 2  # the index of its cell


def tour_cells() -> list[str]:
    notebook = nbformat.read(REPOSITORY / "notebooks" / "00_tour.ipynb", as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    """The tour up to its dashboard."""
    notebook = open_notebook(tour_cells()[:3])
    notebook.page.locator(".qlab-grid tbody tr").first.wait_for(timeout=120_000)
    notebook.page.locator(".qlab-pane[data-ready]").first.wait_for(timeout=60_000)
    notebook.idle()
    return notebook


def cell(notebook, row: str, column: str) -> Locator:
    rows = notebook.page.locator(".qlab-grid tbody tr").filter(has=notebook.page.get_by_text(row, exact=True))
    return rows.first.locator("th, td").nth(COLUMNS.index(column))


def levels(notebook) -> int:
    """How many grid points the histogram draws."""
    return int(notebook.py("print(len(lab._dashboard.histogram._values.levels.data['value']))"))


def grid_pixels(notebook) -> bytes:
    return notebook.page.locator(".qlab-pane").first.screenshot()


def score(notebook) -> str:
    return notebook.page.locator(".qlab-score").first.inner_text()


def test_the_dashboard_shows_table_histogram_and_scores(notebook):
    expect(notebook.page.get_by_role("grid").first).to_be_visible()
    expect(notebook.page.locator(".qlab-score").first).to_contain_text("accuracy")
    expect(notebook.page.locator(".qlab-score").first).not_to_contain_text("measuring", timeout=30_000)
    assert levels(notebook) == 256


def test_two_bits_by_mouse_move_histogram_and_scores(notebook):
    before, picture = score(notebook), grid_pixels(notebook)
    target = cell(notebook, "stem.conv", "weight_bits")
    target.dblclick()
    target.locator("select").select_option("2")
    expect(target).to_have_text("2")
    notebook.eventually("print(sim['stem.conv'].weight.bits)", "2")
    assert levels(notebook) == 4
    expect(notebook.page.locator(".qlab-score").first).not_to_have_text(before, timeout=30_000)
    expect(notebook.page.locator(".qlab-score").first).not_to_contain_text("measuring", timeout=30_000)
    assert float(notebook.py("print(float(lab.known_scores['sqnr'].quantized))")) < 25
    assert grid_pixels(notebook) != picture
    notebook.screenshot("dashboard_2_bits")


def test_the_keyboard_does_the_same_and_undo_takes_it_back(notebook):
    target = cell(notebook, "blocks.0.expand.conv", "weight_bits")
    target.click()
    notebook.page.keyboard.press("3")
    expect(target).to_have_text("3")
    notebook.eventually("print(sim['blocks.0.expand.conv'].weight.bits, lab.selected)", "3 ('blocks.0.expand.conv',)")
    assert levels(notebook) == 8
    notebook.page.keyboard.press("Control+z")
    expect(target).to_have_text("8")
    notebook.eventually("print(sim['blocks.0.expand.conv'].weight.bits, lab.step)", "8 1")


def test_a_cell_moves_the_widgets(notebook):
    notebook.py("lab.set('blocks.2.expand.conv', 'weight', bits=5)")
    expect(cell(notebook, "blocks.2.expand.conv", "weight_bits")).to_have_text("5")
    notebook.run("sim['blocks.2.project.conv'].weight.bits = 6")  # noticed after the cell
    expect(cell(notebook, "blocks.2.project.conv", "weight_bits")).to_have_text("6")


def test_a_refused_edit_says_why_and_an_error_is_shown(notebook):
    target = cell(notebook, "stem.conv", "weight_bits")
    target.click()
    notebook.page.keyboard.press("9")
    expect(notebook.page.locator(".qlab-grid").get_by_role("alert").first).to_contain_text("takes 2, 3, 4")
    notebook.page.keyboard.press("Escape")


def test_a_reload_keeps_the_current_state(notebook):
    notebook.reload()
    notebook.page.locator(".qlab-pane[data-ready]").first.wait_for(timeout=60_000)
    expect(cell(notebook, "stem.conv", "weight_bits")).to_have_text("2", timeout=30_000)
    notebook.screenshot("dashboard_reloaded")


def test_dark_theme_and_a_small_saved_notebook(notebook):
    notebook.theme("Dark")
    notebook.screenshot("dashboard_dark")
    notebook.theme("Light")
    notebook.command("docmanager:save")
    name = re.search(r"([0-9a-f]{8}\.ipynb)", notebook.page.url)[1]
    saved = (notebook.server.notebooks / name).read_text()
    assert len(saved) < 200_000
    outputs = [o for c in json.loads(saved)["cells"] for o in c.get("outputs", [])]
    static = "".join("".join(o.get("data", {}).get("text/html", "")) for o in outputs)
    assert "<table" in static
    assert "data:image/svg+xml" in static
