"""The pane in a real JupyterLab: drawn offline, patched, tapped, reloaded, themed, and quiet when left alone."""

import statistics
import time

import pytest
from playwright.sync_api import Locator, expect

from tests.browser.conftest import wait_until

pytestmark = pytest.mark.browser

SETUP = """
from bokeh.events import Tap
from bokeh.models import ColumnDataSource
from bokeh.plotting import figure
from qlab.views.bokeh_pane import BokehPane

received, taps, selections = [], [], []

class CountingPane(BokehPane):
    def receive(self, message):
        if "document_ready" not in str(message):
            received.append(message)
        super().receive(message)

def bars(heights, **settings):
    source = ColumnDataSource({"x": list(range(len(heights))), "height": heights})
    plot = figure(width=400, height=220, tools="tap,pan,wheel_zoom,reset", title="noise of each layer",
                  x_axis_label="layer", y_axis_label="SQNR [dB]")
    plot.toolbar.logo = None
    plot.vbar("x", top="height", width=0.8, source=source, fill_color="#0072B2", line_color=None, legend_label="8 bits")
    source.selected.on_change("indices", lambda attr, old, new: selections.append(list(new)))
    plot.on_event(Tap, lambda event: taps.append(round(event.x)))
    return CountingPane(plot, **settings), source, plot
"""
TITLE_COLOUR = "el => getComputedStyle(el).getPropertyValue('--bk-title-text-color')"


@pytest.fixture(scope="module")
def shared_notebook(open_notebook):
    return open_notebook([SETUP])


def show(notebook, code: str) -> Locator:
    pane = notebook.run(code).locator(".qlab-pane")
    expect(pane).to_have_attribute("data-ready", "true", timeout=20_000)
    expect(pane.locator("canvas").first).to_be_visible()
    return pane


PICTURE = """el => {
    const pictures = [];
    const descend = (node) => {
        if (node.tagName === 'CANVAS' && node.width > 4 && node.height > 4) {
            // The outermost pixels are half covered: Bokeh paints them a little darker each time.
            const inside = new OffscreenCanvas(node.width - 4, node.height - 4).getContext('2d');
            inside.drawImage(node, -2, -2);
            const { data } = inside.getImageData(0, 0, node.width - 4, node.height - 4);
            let hash = 0;
            for (const byte of data) hash = (Math.imul(hash, 31) + byte) | 0;
            pictures.push(hash);
        }
        for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) descend(child);
    };
    descend(el);
    return pictures.join();
}"""


def painted(pane: Locator) -> str:
    """A checksum of all canvas pixels of a pane: changes with the picture."""
    return pane.evaluate(PICTURE)


def wait_for_new_picture(pane: Locator, old: str) -> None:
    assert wait_until(pane.page, lambda: painted(pane), lambda picture: picture != old) != old


def wait_for_equal_pictures(pane: Locator, other: Locator) -> str:
    """The picture that both have in the end: a picture on its way to the final one may look finished, two do not."""
    pictures = wait_until(
        pane.page, lambda: (painted(pane), painted(other)), lambda both: both[0] == both[1] and bool(both[0])
    )
    assert pictures[0] == pictures[1]
    return pictures[0]


def click_bar(pane: Locator, index: int, of: int) -> None:
    frame = pane.locator(".bk-Figure").first.bounding_box()
    left, right = frame["x"] + 60, frame["x"] + frame["width"] - 45
    pane.page.mouse.click(left + (index + 0.5) / of * (right - left), frame["y"] + frame["height"] * 0.7)


def test_a_pane_is_drawn_and_sends_nothing_until_touched(notebook):
    pane = show(notebook, "received.clear(); pane, source, plot = bars([30, 20, 25, 10], label='worst 10 dB'); pane")
    expect(pane).to_have_attribute("aria-label", "worst 10 dB")
    notebook.screenshot("pane_light", pane)
    pane.hover()
    notebook.page.wait_for_timeout(300)  # for messages, which must not come
    assert notebook.py("print(received)") == "[]"


def test_changes_in_python_reach_the_pixels(notebook, measure):
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    times = pane.evaluate(
        """async (el) => {
            const picture = () => (PICTURE)(el);
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const times = [];
            let before = picture();
            for (let i = 0; i < 20; i++) {
                const start = performance.now();
                const height = 5 + (i * 7) % 24;
                const code = `source.data = {"x": [0, 1, 2, 3], "height": [30, 20, ${height}, 10]}`;
                kernel.requestExecute({ code, store_history: false });
                for (;;) {
                    await new Promise(requestAnimationFrame);
                    const after = picture();
                    if (after !== before) { before = after; break; }
                    if (performance.now() - start > 5000) throw new Error(`update ${i} never painted`);
                }
                times.push(performance.now() - start);
            }
            return times;
        }""".replace("PICTURE", PICTURE)
    )
    times.sort()
    measure(f"Python to pixels: median {statistics.median(times):.0f} ms, 90% in {times[17]:.0f} ms")
    assert statistics.median(times) < 1000


def test_a_batch_is_one_message(notebook):
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    before = painted(pane)
    count = notebook.py("""
sent, send = [], pane.send
pane.send = lambda *message: (sent.append(message), send(*message))
with pane.batch():
    plot.title.text = "after the batch"
    source.data = {"x": [0, 1], "height": [1, 2]}
    source.stream({"x": [2], "height": [3]})
print(len(sent))""")
    assert count == "1"
    wait_for_new_picture(pane, before)
    expect(pane.get_by_role("alert")).to_be_hidden()


def test_a_tap_and_its_selection_reach_python_once(notebook):
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); taps.clear(); selections.clear(); pane")
    click_bar(pane, 2, of=4)
    notebook.eventually("print(source.selected.indices)", "[2]")
    notebook.page.wait_for_timeout(200)  # for a second call, which must not come
    assert notebook.py("print(taps, selections)") == "[2] [[2]]"


def test_what_is_done_in_the_browser_is_saved_once_things_are_quiet(notebook):
    pane = show(
        notebook,
        """
pane, source, plot = bars([30, 20, 25, 10])
saved, send_state = open("saved.txt", "a", buffering=1), pane.send_state
def keep(key=None):
    print(pane.take_snapshot(), file=saved)
    send_state(key)
pane.send_state = keep
pane""",
    )
    notebook.py("saved.truncate(0)")
    click_bar(pane, 2, of=4)
    path = notebook.server.notebooks / "saved.txt"  # no cell may run meanwhile: that would save as well
    (saved,) = wait_until(notebook.page, lambda: path.read_text().splitlines(), bool)
    assert '"indices":[2]' in saved


def test_a_thread_repaints_while_a_cell_runs(notebook):
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    before = painted(pane)
    notebook.run("""
import threading
def work(): source.data = {"x": [0, 1], "height": [5, 50]}
thread = threading.Thread(target=work)
thread.start(); thread.join()""")
    pane.scroll_into_view_if_needed()
    wait_for_new_picture(pane, before)


def test_a_pan_sends_few_messages(notebook, measure):
    pane = show(
        notebook,
        """
from bokeh.models import Range1d
pane, source, plot = bars([30, 20, 25, 10])
plot.x_range = Range1d(-1, 4)
received.clear()
pane""",
    )
    box = pane.bounding_box()
    mouse = notebook.page.mouse
    start = time.monotonic()
    mouse.move(box["x"] + 150, box["y"] + 110)
    mouse.down()
    for step in range(60):
        mouse.move(box["x"] + 150 + step, box["y"] + 110)
    mouse.up()
    taken_s = time.monotonic() - start
    notebook.eventually("print('released' in [message['kind'] for message in received])", "True")
    left, messages = notebook.py("print(plot.x_range.start, len(received))").split()
    measure(f"60 moves of a pan in {taken_s:.1f} s: {messages} messages")
    assert float(left) < -1
    assert int(messages) <= taken_s / 0.05 + 2


def test_a_second_view_is_current_and_follows(notebook):
    first = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    before = painted(first)
    notebook.py("source.data = {'x': [0, 1], 'height': [5, 50]}")
    wait_for_new_picture(first, before)
    second = show(notebook, "pane")
    current = wait_for_equal_pictures(first, second)
    click_bar(second, 1, of=2)
    wait_for_new_picture(first, current)
    assert notebook.py("print(source.selected.indices)") == "[1]"


def test_an_exception_in_a_callback_is_shown_at_the_pane(notebook):
    pane = show(
        notebook,
        """
pane, source, plot = bars([30, 20, 25, 10])
def fail(attr, old, new): raise RuntimeError("no such <layer>")
source.selected.on_change("indices", fail)
pane""",
    )
    click_bar(pane, 1, of=4)
    expect(pane.get_by_role("alert")).to_have_text("RuntimeError: no such <layer>")


def test_a_figure_that_cannot_be_drawn_says_so(notebook):
    output = notebook.run("""
class Broken(BokehPane):
    def take_snapshot(self):
        return super().take_snapshot().replace('"Figure"', '"NoSuchModel"')
broken = Broken(figure())
broken""")
    alert = output.get_by_role("alert")
    expect(alert).to_contain_text("The plot could not be drawn", timeout=20_000)
    expect(alert).to_contain_text("NoSuchModel")


def test_a_patch_that_does_not_fit_is_mended_by_the_whole_document(notebook):
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    before = painted(pane)
    notebook.py("""
import json
with pane._bookkeeping:
    plot.title._property_values["text"] = "mended"
unknown = {"kind": "ModelChanged", "model": {"id": "unknown"}, "attr": "text", "new": "x"}
pane.send({"kind": "patch", "patch": json.dumps({"events": [unknown]}), "buffers": []})""")
    wait_for_new_picture(pane, before)


def test_the_theme_of_jupyterlab_is_followed(notebook):
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    light = wait_for_equal_pictures(pane, show(notebook, "bars([30, 20, 25, 10])[0]"))
    light_title = pane.evaluate(TITLE_COLOUR)
    notebook.theme("Dark")
    try:
        wait_for_new_picture(pane, light)
        dark = wait_for_equal_pictures(pane, show(notebook, "bars([30, 20, 25, 10])[0]"))
        assert pane.evaluate(TITLE_COLOUR) != light_title
        assert dark != light
        notebook.screenshot("pane_dark", pane)
    finally:
        notebook.theme("Light")
    assert wait_until(notebook.page, lambda: painted(pane), lambda picture: picture == light) == light


def test_closing_a_pane_removes_its_view(notebook):
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    notebook.py("pane.close(); plot.title.text = 'nobody listens'")
    expect(pane).to_have_count(0)


def test_a_reload_shows_the_current_figure_and_selection(notebook):
    """Against a pane made with the figure and the selection as they should be: both survive the reload."""
    pane = show(notebook, "pane, source, plot = bars([30, 20, 25, 10]); pane")
    click_bar(pane, 2, of=4)
    notebook.eventually("print(source.selected.indices)", "[2]")
    notebook.py("plot.title.text = 'changed before the reload'")
    code = "expected, selected, titled = bars([30, 20, 25, 10]); selected.selected.indices = [2]"
    show(notebook, f"{code}; titled.title.text = 'changed before the reload'; expected")
    notebook.reload()
    notebook.page.locator(".jp-Notebook .jp-Cell").last.scroll_into_view_if_needed()
    count = notebook.page.evaluate("window.jupyterapp.shell.currentWidget.content.model.cells.length")
    again, expected = (notebook.output(count - back).locator(".qlab-pane") for back in (2, 1))
    for one in (again, expected):
        expect(one).to_have_attribute("data-ready", "true")
        one.scroll_into_view_if_needed()
    notebook.page.mouse.move(0, 0)
    picture = wait_for_equal_pictures(again, expected)
    assert notebook.py("print(source.selected.indices)") == "[2]"
    wait_for_new_picture(show(notebook, "bars([30, 20, 25, 10])[0]"), picture)


def test_the_page_own_bokeh_is_left_alone(notebook):
    assert notebook.page.evaluate("typeof window.Bokeh") == "undefined"
