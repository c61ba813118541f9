"""The workbench in a real JupyterLab of 1280 x 800 with its sidebar open: every tab by mouse and by keyboard."""

import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, expect

from tests.browser.conftest import wait_until

pytestmark = pytest.mark.browser
SETUP = """
import time, torch, qlab
torch.manual_seed(0)
torch.set_num_threads(1)
digits = qlab.examples.digits()
model, example, batches = qlab.examples.mobilenet(), digits.test[0], digits.calibration()
score = qlab.Accuracy(digits.test)
sim = qlab.QuantSim(model, example, qlab.presets.w8a8())
sim.calibrate(batches)
lab = qlab.Lab(sim, batches, score=score)
lab.select("stem.conv")
"""
SLOW = """
from dataclasses import dataclass
from qlab.techniques import Report, Technique

@dataclass(frozen=True)
class Slow(Technique):
    "Waits, and changes a weight meanwhile."
    steps: int = qlab.settings.setting(300, "how many tenths of a second", minimum=1, unit="steps")

    def run(self, sim, batches, score, progress):
        for step in range(self.steps):
            progress.step(step, self.steps, "waiting")
            next(iter(sim.model.parameters())).data.add_(0.01)
            time.sleep(0.1)
        return Report("Slow", "waited")
"""
HOSTILE = """
NAME = "<img src=x onerror=hacked=1>"

class Hostile(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(NAME, torch.nn.Conv2d(3, 4, 3))
        self.add_module("fc", torch.nn.Linear(4, 3))

    def forward(self, x):
        return self.fc(torch.relu(getattr(self, NAME)(x)).mean((2, 3)))

data = [torch.randn(4, 3, 8, 8)]
hostile = qlab.Lab(qlab.QuantSim(Hostile().eval(), data[0], qlab.presets.w8a8()), data)
hostile.select(NAME)
hostile.set(NAME, "weight", bits=4)
over = []
hostile.events.job_ended.connect(lambda job: over.append(f"{job.title} {job.state.value}"))
hostile
"""
DEEP = """
torch.manual_seed(0)
blocks = [layer for _ in range(200) for layer in (torch.nn.Linear(4, 4), torch.nn.ReLU())]
data = [torch.randn(4, 4)]
deep = qlab.Lab(qlab.QuantSim(torch.nn.Sequential(*blocks).eval(), data[0], qlab.presets.w8a8()), data)
picture = qlab.views.GraphView(deep)
picture
"""
SPAN = (
    "span = picture.pane.document.roots[0].x_range; print([round(float(edge), 2) for edge in (span.start, span.end)])"
)
ORANGE = (230, 159, 0)  # clip lines, selected layers
BAR = (222, 126, 51)  # of a channel, on white
FIRST_WEIGHT = "next(iter(sim.model.parameters())).sum().item()"


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    """One lab with its dashboard, in a window of a laptop's size."""
    notebook = open_notebook([SETUP, "lab"])
    notebook.page.set_viewport_size({"width": 1280, "height": 800})
    notebook.command("application:toggle-left-area")
    notebook.page.locator(".qlab-grid tbody tr").first.wait_for(timeout=120_000)
    notebook.page.locator(".qlab-pane[data-ready]").first.wait_for(timeout=60_000)
    notebook.idle()
    return notebook


@pytest.fixture
def dashboard(notebook) -> Locator:
    """The dashboard, at the top of the window, its scores measured."""
    found = notebook.page.get_by_role("region", name="dashboard").first
    expect(found.locator(".qlab-score")).not_to_contain_text("measuring", timeout=60_000)
    found.evaluate("element => element.scrollIntoView()")
    return found


def show(dashboard: Locator, title: str) -> Locator:
    """Bring a tab to the front and return what it holds."""
    dashboard.get_by_role("tab", name=title).click()
    expect(dashboard.get_by_role("tab", name=title)).to_have_attribute("aria-selected", "true")
    panel = dashboard.locator(".widget-tab-contents > .qlab-view, .widget-tab-contents > * > .qlab-view")
    view = panel.locator("visible=true").first
    expect(view).to_be_visible()
    expect(view.locator(".qlab-pane:not([data-ready])").locator("visible=true")).to_have_count(0)
    return view


def titles_of(dashboard: Locator) -> list[str]:
    return [title.strip() for title in dashboard.get_by_role("tab").all_inner_texts()]


def pixels(pane: Locator, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a pane has nearly this colour."""
    picture = np.array(Image.open(io.BytesIO(pane.screenshot())).convert("RGB")).astype(int)
    return np.abs(picture - np.array(colour)).sum(2) < 60


# what a person cannot read as a whole: its text is longer than its place, or its place ends outside the dashboard
CUT = """root => {
    const right = (e) => e.getBoundingClientRect().right;
    return [...root.querySelectorAll('.widget-label, .widget-label-basic, .lm-TabBar-tabLabel, button, th')]
    .filter(e => e.checkVisibility() && e.clientWidth > 0)
    .filter(e => e.scrollWidth > e.clientWidth + 1
        || e.closest('.qlab-report') === null && right(e) > right(root) + 1)
    .map(e => e.textContent);
}"""
# texts whose colour stands out from their ground by less than 3:1; what is disabled may
PALE = """root => {
    const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const parts = (colour) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const over = ([r, g, b, a], ground) => [r, g, b].map((part, i) => (part * a + ground[i] * (255 - a)) / 255);
    const own = (e) => parts(getComputedStyle(e).backgroundColor);
    const ground = (e) => e === null ? [255, 255, 255] : over(own(e), ground(e.parentElement));
    const light = (colour) => colour
        .map((part) => part / 255)
        .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (e) => {
        const below = ground(e);
        const [a, b] = [light(over(parts(getComputedStyle(e).color), below)), light(below)].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    };
    const hasText = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    return [...root.querySelectorAll('*')]
        .filter(e => hasText(e) && e.checkVisibility() && !e.matches('option') && e.closest(':disabled') === null)
        .filter(e => contrast(e) < 3)
        .map(e => `${e.textContent} ${contrast(e).toFixed(1)}`);
}"""
ACTIVE = """() => {
    const e = document.activeElement;
    const name = e.labels?.[0]?.textContent || e.getAttribute('aria-label') || e.title || e.textContent;
    e.setAttribute('data-visited', 'true');
    return [name.trim(), e.closest('[role=region][aria-label=dashboard]') !== null];
}"""


def tab_to(dashboard: Locator, name: str, key: str = "Tab") -> None:
    """Press Tab until the focus is on what has this name."""
    seen = []
    for _ in range(80):
        dashboard.page.keyboard.press(key)
        seen.append(dashboard.page.evaluate(ACTIVE)[0])
        if seen[-1] == name:
            return
    raise AssertionError(f"{key} does not lead to {name!r}: {seen}")


def places(pane: Locator, colour: tuple[int, int, int]) -> np.ndarray:
    """The rows and columns of a pane that have nearly this colour, once there are some and they stay."""
    seen: list[np.ndarray] = [np.zeros((1, 1), bool)]

    def look() -> bool:
        seen.append(pixels(pane, colour))
        return seen[-1].any() and np.array_equal(seen[-2], seen[-1])

    assert wait_until(pane.page, look, bool), f"nothing of the colour {colour} came to rest"
    return np.argwhere(seen[-1]).T


def test_it_fits_a_laptop(notebook, dashboard):
    """844 px are left for the dashboard at 1280 with the sidebar open: nothing is wider."""
    width, needed, height = dashboard.evaluate("e => [e.clientWidth, e.scrollWidth, e.scrollHeight]")
    notebook.screenshot("workbench_layers")
    assert width < 900
    assert needed <= width + 1
    assert height < 850


def test_tabs_and_keys_by_keyboard_alone(notebook, dashboard):
    cells = notebook.page.locator(".jp-Cell").count()
    titles = titles_of(dashboard)
    dashboard.get_by_role("tab", name=titles[0]).focus()
    for key, title in (("ArrowRight", titles[1]), ("ArrowRight", titles[2]), ("ArrowLeft", titles[1])):
        notebook.page.keyboard.press(key)
        notebook.page.keyboard.press("Enter")
        expect(dashboard.get_by_role("tab", name=title)).to_have_attribute("aria-selected", "true")
    notebook.page.keyboard.press("d")
    notebook.page.keyboard.press("d")
    assert notebook.page.locator(".jp-Cell").count() == cells  # JupyterLab's "d d" would have deleted one
    notebook.py("lab.set('stem.conv', 'weight', bits=5)")
    notebook.page.keyboard.press("Control+z")
    notebook.eventually("print(lab.step, sim['stem.conv'].weight.bits)", "0 8")


def test_a_technique_by_keyboard_alone(notebook, dashboard):
    dashboard.get_by_role("tab", name="Layers").focus()
    for _ in range(titles_of(dashboard).index("Techniques")):
        notebook.page.keyboard.press("ArrowRight")
    notebook.page.keyboard.press("Enter")
    tab_to(dashboard, "Technique")
    notebook.page.keyboard.type("CrossL")
    expect(dashboard.get_by_label("iterations")).to_have_value("100")
    tab_to(dashboard, "Run")
    notebook.page.keyboard.press("Enter")
    notebook.eventually("print(lab.step, lab.action)", "1 CrossLayerEqualization()")
    tab_to(dashboard, "Undo", "Shift+Tab")
    notebook.page.keyboard.press("Enter")
    notebook.eventually("print(lab.step)", "0")


def test_tab_reaches_everything_to_press_and_leaves(notebook, dashboard):
    for title in titles_of(dashboard):
        show(dashboard, title)
        dashboard.get_by_role("tab", name=title).focus()
        inside = True
        for _ in range(120):
            notebook.page.keyboard.press("Tab")
            _, inside = notebook.page.evaluate(ACTIVE)
            if not inside:
                break
        assert not inside, f"the focus does not leave {title}"
        missed = dashboard.evaluate(
            """root => [...root.querySelectorAll('.widget-tab-contents :is(button, select, input, textarea)')]
                .filter(e => e.checkVisibility() && !e.disabled && e.tabIndex >= 0 && e.type !== 'radio')
                .filter(e => !e.hasAttribute('data-visited'))
                .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert not missed, title
    show(dashboard, "Layers")


def test_everything_to_press_has_a_name(dashboard):
    for title in titles_of(dashboard):
        show(dashboard, title)
        nameless = dashboard.evaluate(
            """root => [...root.querySelectorAll('button, select, input, textarea')]
                .filter(e => e.checkVisibility())
                .filter(e => !(e.labels?.length && e.labels[0].textContent.trim()) && !e.getAttribute('aria-label')
                    && !e.title && !e.textContent.trim() && !e.closest('label, [title]'))
                .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert not nameless, title


def test_a_group_is_selected_by_kind_and_edited_at_once(notebook, dashboard):
    show(dashboard, "Layers")
    dashboard.get_by_label("kind").select_option("depthwise_conv (8)")
    notebook.eventually("print(len(lab.selected))", "8")
    dashboard.get_by_title("value of the setting").select_option("4")
    dashboard.get_by_role("button", name="Apply").click()
    notebook.eventually("print({sim[n].weight.bits for n in lab.selected}, lab.step)", "{4} 1")
    dashboard.get_by_label("noise").select_option("noisiest 10%")
    notebook.eventually("print(3 < len(lab.selected) < 8)", "True")
    dashboard.get_by_label("Select", exact=True).fill("blocks.1.*")
    dashboard.get_by_label("Select", exact=True).press("Enter")
    notebook.eventually("print({n.split('.')[1] for n in lab.selected})", "{'1'}")


def test_a_dragged_clip_line_previews_and_sets_the_range_as_one_step(notebook, dashboard):
    notebook.py("lab.go_to(0); lab.select('stem.conv')")
    layers = show(dashboard, "Layers")
    layers.get_by_label("error curve").check()
    pane = layers.locator(".qlab-pane").first
    pane.scroll_into_view_if_needed()
    columns = np.bincount(places(pane, ORANGE)[1])
    lines = np.flatnonzero(columns > 0.4 * columns.max())
    box = pane.bounding_box()
    x, y = box["x"] + float(lines.max()) - 1, box["y"] + box["height"] * 0.5
    step, high = notebook.py("print(lab.step, lab.histogram('stem.conv').high)").split()
    notebook.page.mouse.move(x, y)
    notebook.page.mouse.down()
    for i in range(1, 9):
        notebook.page.mouse.move(x - 12 * i, y)
        notebook.page.wait_for_timeout(40)
    preview = layers.get_by_text("preview:")
    expect(preview).to_be_visible()
    expect(preview).not_to_contain_text(" 0.00% clipped")
    assert notebook.py("print(lab.step)") == step
    notebook.screenshot("workbench_dragging")
    notebook.page.mouse.up()
    notebook.eventually("print(lab.step, sim['stem.conv'].weight.frozen)", f"{int(step) + 1} True")
    assert float(notebook.py("print(lab.histogram('stem.conv').high)")) < 0.8 * float(high)
    expect(layers.get_by_text("range set by hand")).to_be_visible()
    layers.get_by_role("button", name="By rule").click()
    notebook.eventually("print(sim['stem.conv'].weight.frozen)", "False")
    layers.get_by_label("error curve").uncheck()


def test_a_range_is_typed_and_a_channel_clicked(notebook, dashboard):
    layers = show(dashboard, "Layers")
    layers.get_by_role("spinbutton", name="range").fill("-0.2")
    layers.get_by_role("spinbutton", name="range").press("Tab")
    layers.get_by_title("set this range and keep it").click()
    notebook.eventually("print(sim['stem.conv'].weight.frozen, round(lab.histogram('stem.conv').low, 1))", "True -0.2")
    channels = layers.locator(".qlab-pane").nth(1)
    rows, columns = places(channels, BAR)
    at = len(rows) // 2
    channels.click(position={"x": float(columns[at]), "y": float(rows[at])})
    expect(layers.locator(".qlab-view b", has_text=re.compile(r"channel \d+"))).to_be_visible()
    layers.get_by_title("show one channel alone").select_option("channel 3")
    expect(layers.locator(".qlab-view b", has_text="stem.conv weight channel 3")).to_be_visible()
    notebook.screenshot("workbench_channel")


def test_a_click_in_the_heat_map_shows_the_channel(notebook, dashboard):
    view = show(dashboard, "Channels")
    pane = view.locator(".qlab-pane").first
    picture = np.array(Image.open(io.BytesIO(pane.screenshot())).convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.ptp(picture, axis=2) > 40)  # cells have colours; names and grid are grey
    pane.click(position={"x": float(columns.min()) + 4, "y": float(rows[columns == columns.min()].min()) + 6})
    caption = view.locator("[role=status] b")
    expect(caption).to_have_text(re.compile(r"\S+ weight channel \d+"))
    layer, _, _, channel = caption.inner_text().split()
    clicked = (
        "view = lab._dashboard.views['Channels']; print(*view._figure.cells_at(view._figure.source.selected.indices))"
    )
    assert notebook.py(clicked).startswith(f"('{layer}', {channel},")
    assert notebook.py("print(lab.selected)") == f"('{layer}',)"
    notebook.screenshot("workbench_channels")


def test_a_technique_refuses_runs_and_reports(notebook, dashboard):
    show(dashboard, "Techniques")
    dashboard.get_by_label("Technique", exact=True).select_option("CrossLayerEqualization")
    expect(dashboard.get_by_label("iterations")).to_have_value("100")  # that of another technique until Python answers
    dashboard.get_by_label("iterations").fill("0")
    dashboard.get_by_role("button", name="Run").click()
    refusal = dashboard.get_by_role("alert").filter(has_text="must be at least 1")
    expect(refusal).to_be_visible()
    notebook.screenshot("workbench_refused")
    dashboard.get_by_label("iterations").fill("20")
    dashboard.get_by_role("button", name="Run").click()
    expect(refusal).not_to_be_visible()
    expect(dashboard.get_by_text(re.compile("CrossLayerEqualization: done|done after")).first).to_be_visible(
        timeout=60_000
    )
    notebook.eventually("print(lab.action)", "CrossLayerEqualization(iterations=20)")
    notebook.screenshot("workbench_technique")


def test_a_technique_of_a_cell_appears_pauses_and_is_cancelled(notebook, dashboard, measure):
    show(dashboard, "Techniques")
    notebook.run(SLOW)
    before = notebook.py(f"print({FIRST_WEIGHT}, lab.step)")
    dashboard.evaluate("element => element.scrollIntoView()")
    dashboard.get_by_label("Technique", exact=True).select_option("Slow")
    dashboard.get_by_role("button", name="Run").click()
    expect(dashboard.get_by_text(re.compile(r"\d+ of 300 waiting"))).to_be_visible(timeout=20_000)
    dashboard.get_by_role("button", name="Pause").click()
    expect(dashboard.get_by_role("button", name="Resume")).to_be_visible()
    notebook.eventually("print(lab.is_busy, lab.jobs[0].is_paused)", "True True")
    dashboard.get_by_role("button", name="Resume").click()
    show(dashboard, "Layers")
    dashboard.get_by_role("button", name="Apply").click()
    expect(dashboard.get_by_role("alert").filter(has_text="is changing the sim")).to_be_visible()
    notebook.screenshot("workbench_job")
    began = time.perf_counter()
    dashboard.get_by_role("button", name="Cancel").click()
    expect(dashboard.get_by_text(re.compile("cancelled after"))).to_be_visible()
    measure(f"Cancel to cancelled: {time.perf_counter() - began:.2f} s")
    assert notebook.py(f"print({FIRST_WEIGHT}, lab.step)") == before


def test_history_goes_back_compares_and_gives_the_script(notebook, dashboard):
    notebook.py("lab.set('head.conv', 'weight', bits=3)")
    show(dashboard, "History")
    last = int(notebook.py("print(lab.step)"))
    rows = dashboard.get_by_role("grid", name="history").locator("tbody tr")
    expect(rows).to_have_count(last + 1)
    rows.nth(1).locator("td").nth(1).click()
    notebook.eventually("print(lab.step)", "1")
    expect(rows.nth(2)).to_contain_text("undone")
    notebook.page.keyboard.press("ArrowUp")
    notebook.page.keyboard.press("Space")
    notebook.eventually("print(lab.step)", "0")
    notebook.py(f"lab.go_to({last})")
    dashboard.get_by_label("Compare").select_option(index=0)
    expect(dashboard.get_by_text(re.compile(r"\d+ differences in \d+ layers"))).to_be_visible()
    notebook.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    dashboard.get_by_role("button", name="Copy script").click()
    expect(dashboard.get_by_text(re.compile(r"Copied \d+ lines"))).to_be_visible()
    copied = notebook.page.evaluate("navigator.clipboard.readText()")
    assert copied == dashboard.get_by_role("textbox", name="script").input_value()
    assert copied.strip() == notebook.py("print(lab.script())")
    notebook.screenshot("workbench_history")


def test_the_page_for_a_colleague_is_saved(notebook, dashboard):
    show(dashboard, "History")
    dashboard.get_by_label("Report").fill("page.html")
    dashboard.get_by_label("Report").press("Tab")
    dashboard.get_by_role("button", name="Save as HTML").click()
    expect(dashboard.get_by_text("Saved page.html")).to_be_visible(timeout=60_000)
    assert "<html" in (notebook.server.notebooks / "page.html").read_text()


def test_a_click_in_the_graph_selects(notebook, dashboard):
    notebook.py("lab.go_to(0); lab.select('blocks.2.expand.conv')")
    pane = show(dashboard, "Graph").locator(".qlab-pane")
    rows, columns = places(pane, ORANGE)
    place = {"x": float(np.median(columns)), "y": float(np.median(rows))}
    notebook.py("lab.select('stem.conv')")
    pane.click(position=place)
    notebook.eventually("print(lab.selected)", "('blocks.2.expand.conv',)")
    dashboard.get_by_label("Colour by").select_option(index=2)
    expect(pane).to_have_attribute("aria-label", re.compile("^noise"))
    notebook.screenshot("workbench_graph")


def test_the_tab_in_front_survives_a_reload(notebook):
    notebook.reload()
    dashboard = notebook.page.get_by_role("region", name="dashboard").first
    expect(dashboard.get_by_role("tab", name="Graph")).to_have_attribute("aria-selected", "true", timeout=60_000)
    pane = show(dashboard, "Layers").locator(".qlab-pane").first
    assert np.ptp(places(pane, ORANGE)[1]) > 200
    notebook.screenshot("workbench_reloaded")


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_every_tab_is_whole_and_legible(notebook, dashboard, theme):
    """At 1280 x 800, beside the sidebar, after all of the above."""
    notebook.py("lab.go_to(lab.history.step.iloc[-1]); lab.set('head.conv', 'weight', bits=3); lab.select('stem.conv')")
    pane = show(dashboard, "Layers").locator(".qlab-pane").first
    top = places(pane, ORANGE)[0].min()
    notebook.theme(theme)
    assert abs(places(pane, ORANGE)[0].min() - top) <= 1  # the legend, made anew, still has its room
    for title in titles_of(dashboard):
        view = show(dashboard, title)
        notebook.screenshot(f"workbench_{theme.lower()}_{title.lower()}")
        width, needed = dashboard.evaluate("e => [e.clientWidth, e.scrollWidth]")
        assert needed <= width + 1, title
        assert dashboard.evaluate(CUT) == [], title
        assert dashboard.evaluate(PALE) == [], title
        if title == "History":
            table = view.locator(".qlab-report", has=notebook.page.get_by_role("columnheader", name="after"))
            table.scroll_into_view_if_needed()
            assert table.evaluate("e => e.scrollWidth <= e.clientWidth")
            notebook.screenshot(f"workbench_{theme.lower()}_compare")
    page = notebook.page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    cells = notebook.page.locator(".jp-WindowedPanel-outer").evaluate("e => [e.scrollWidth, e.clientWidth]")
    assert page[0] <= page[1]
    assert cells[0] <= cells[1]
    show(dashboard, "Layers")


def test_a_graph_of_hundreds_of_layers_is_zoomed_moved_and_clicked(notebook, measure):
    began = time.perf_counter()
    output = notebook.run(DEEP)
    pane = output.locator(".qlab-pane")
    expect(pane).to_have_attribute("data-ready", "true")
    measure(f"graph of 401 layers, from the cell to the picture: {time.perf_counter() - began:.1f} s")
    expect(pane).to_have_attribute("aria-label", re.compile("401 layers, 400 edges"))
    whole = notebook.py(SPAN)
    notebook.py("deep.select('200')")
    rows, columns = places(pane, ORANGE)
    notebook.py("deep.select('0')")
    pane.click(position={"x": float(np.median(columns)), "y": float(np.median(rows))})
    notebook.eventually("print(deep.selected)", "('200',)")
    notebook.screenshot("graph_of_401_layers", output)
    box = pane.bounding_box()
    x, y = box["x"] + box["width"] / 3, box["y"] + box["height"] / 2
    notebook.page.mouse.move(x, y)
    notebook.page.mouse.down()
    notebook.page.mouse.move(x + 60, y, steps=4)
    notebook.page.mouse.up()
    moved = wait_until(notebook.page, lambda: json.loads(notebook.py(SPAN)), lambda span: span != json.loads(whole))
    assert moved[0] < json.loads(whole)[0]
    assert moved[1] - moved[0] == pytest.approx(json.loads(whole)[1] - json.loads(whole)[0], abs=0.05)
    pane.locator(".bk-tool-icon-wheel-zoom").click()
    notebook.page.mouse.move(x, y)
    notebook.page.mouse.wheel(0, -300)
    near = wait_until(notebook.page, lambda: json.loads(notebook.py(SPAN)), lambda span: span != moved)
    assert near[1] - near[0] < 0.9 * (moved[1] - moved[0])
    notebook.screenshot("graph_of_401_layers_near", output)
    pane.locator(".bk-tool-icon-reset").click()
    notebook.eventually(SPAN, whole)


def test_hostile_names_run_nowhere(notebook):
    output = notebook.run(HOSTILE)
    region = output.get_by_role("region", name="dashboard")
    region.get_by_role("tab").first.wait_for(timeout=60_000)
    for title in reversed(titles_of(region)):
        show(region, title)
    for title, button, job in (
        ("Diagnosis", "Diagnose", "Diagnose"),
        ("Sensitivity", "Measure", "QuantAnalyzer"),
        ("Findings", "Validate", "Validate"),
        ("Techniques", "Run", "AdaRound"),
    ):
        show(region, title).get_by_role("button", name=button).click()
        notebook.eventually(f"print('{job} done' in over)", "True")
        notebook.screenshot(f"hostile_{title.lower()}")
    show(region, "Layers")
    expect(region.locator(".qlab-grid tbody tr").first).to_be_visible()
    expect(region.get_by_text("<img src=x").first).to_be_visible()
    hacked = "[window.hacked === undefined, document.querySelectorAll('img[src=x]').length]"
    assert notebook.page.evaluate(hacked) == [True, 0]
