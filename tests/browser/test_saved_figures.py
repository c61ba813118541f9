"""A saved page of figures in Chromium: drawn offline, clip lines dragged, hostile names hovered, light turned dark."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page

from qlab import plots

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
# the figures in the page, top to bottom, and where a point of their data is on the screen
FIGURES = "[...Bokeh.index.roots].filter(view => view.model.type === 'Figure')"
PLACE = f"""([number, x, y]) => {{
    const view = {FIGURES}[number];
    const {{ x: left, y: top }} = view.el.getBoundingClientRect();
    return [left + view.frame.x_scale.compute(x), top + view.frame.y_scale.compute(y)];
}}"""
IMAGES = """() => {
    const found = [];
    const descend = (node) => {
        if (node.tagName === 'IMG') found.push(node.outerHTML);
        for (const child of [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes]) descend(child);
    };
    descend(document.body);
    return found;
}"""


@pytest.fixture(scope="module")
def page(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    bins = pd.DataFrame({"left": [-1.0, -0.5, 0.0, 0.5], "right": [-0.5, 0.0, 0.5, 1.0], "count": [1, 4, 4, 1]})
    scores = pd.DataFrame({"layer": [HOSTILE, "fc"], "score": [0.5, 0.8], "note": [HOSTILE, ""]})
    content = (plots.histogram(bins, clip=(-0.8, 0.8), name=HOSTILE), plots.sensitivity(scores, baseline=0.9))
    path = plots.save_html(tmp_path_factory.mktemp("saved") / "report.html", HOSTILE, [plots.Section(HOSTILE, content)])
    page = chromium.new_page(viewport={"width": 800, "height": 800}, color_scheme="light")
    complaints: list[str] = []
    page.on("request", lambda request: complaints.append(request.url) if _leaves(request.url, path) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (complaints.append(f"a script ran: {dialog.message}"), dialog.dismiss()))
    page.goto(path.as_uri())
    page.wait_for_function(f"{FIGURES}.length === 2 && Bokeh.documents[0].is_idle")
    yield page
    assert not complaints
    page.close()


def _leaves(url: str, path: Path) -> bool:
    return url != path.as_uri() and not url.startswith(("data:", "blob:"))


def clip(page: Page) -> list[float]:
    edges = "model.center.find(item => item.type === 'BoxAnnotation' && item.editable)"
    return page.evaluate(
        f"() => {{ const {{ model }} = {FIGURES}[0]; const box = {edges}; return [box.left, box.right]; }}"
    )


def test_a_clip_line_follows_the_mouse_and_the_other_stays(page: Page):
    x, y = page.evaluate(PLACE, [0, 0.8, 3.0])
    target, _ = page.evaluate(PLACE, [0, 0.4, 3.0])
    page.mouse.move(x - 1, y)
    page.mouse.down()
    page.mouse.move(target - 1, y, steps=8)
    assert clip(page) == pytest.approx([-0.8, 0.4], abs=0.01), "while dragging"
    page.mouse.up()
    assert clip(page) == pytest.approx([-0.8, 0.4], abs=0.01)


def test_hovering_a_hostile_name_shows_it_as_text(page: Page):
    x, y = page.evaluate(PLACE, [1, 0.5, 0.0])
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    page.get_by_text(HOSTILE).nth(2).wait_for()  # heading, title of the page, tooltip
    assert page.evaluate(IMAGES) == []


def test_a_click_selects_the_layer(page: Page):
    page.mouse.click(*page.evaluate(PLACE, [1, 0.5, 0.0]))
    selected = f"{FIGURES}[1].model.renderers[0].data_source.selected.indices"
    page.wait_for_function(f"{selected}.length === 1")
    assert page.evaluate(selected) == [0]


def test_figures_follow_the_readers_light_or_dark_setting(page: Page):
    light_pixels = f"""() => {{
        const canvas = {FIGURES}[0].canvas_view?.primary?.canvas ?? {FIGURES}[0].el.shadowRoot.querySelector('canvas');
        const {{ data }} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let bright = 0;
        for (let i = 0; i < data.length; i += 4) bright += data[i + 3] > 200 && data[i] > 215 && data[i + 2] > 215;
        return bright;
    }}"""
    assert page.evaluate(light_pixels) < 50
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"({light_pixels})() > 500")  # ink on the canvas itself
    page.emulate_media(color_scheme="light")
