"""`lab.save_html` in Chromium as a colleague opens it: a file, no network, pictures and tables there, no script run."""

from collections.abc import Iterator

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from torch import nn

import qlab
from tests.browser.conftest import SCREENSHOTS

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=hacked=1>"
FIGURES = "[...Bokeh.index.roots].filter((view) => view.model.type === 'Figure')"
# of each figure, how many points of its canvas are not the ground
INK = f"""() => {FIGURES}.map((view) => {{
    const canvas = view.canvas_view?.primary?.canvas ?? view.el.shadowRoot.querySelector('canvas');
    const {{ data }} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let drawn = 0;
    for (let i = 3; i < data.length; i += 4) drawn += data[i] > 0;
    return drawn;
}})"""


class Small(nn.Module):
    """A layer whose name is markup, and one whose name is not."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Conv2d(3, 8, 3))
        self.add_module("fc", nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(getattr(self, HOSTILE)(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def lab() -> qlab.Lab:
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 8, 8)]
    sim = qlab.QuantSim(Small().eval(), batches[0], qlab.presets.w8a8())
    sim.calibrate(batches)
    lab = qlab.Lab(sim, batches)
    lab.set("fc", "weight", bits=4)
    lab.measure().result()
    return lab


@pytest.fixture(scope="module")
def page(lab: qlab.Lab, chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    path = lab.save_html(tmp_path_factory.mktemp("saved") / "report.html")
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light", offline=True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("request", lambda request: complaints.append(request.url) if _leaves(request.url, path.as_uri()) else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_function(f"{FIGURES}.length > 0 && Bokeh.documents.every((document) => document.is_idle)")
    yield page
    assert not complaints
    context.close()


def _leaves(url: str, page: str) -> bool:
    return url != page and not url.startswith(("data:", "blob:"))


def test_every_figure_is_drawn(lab: qlab.Lab, page: Page) -> None:
    """The noise by layer and the histograms of four tensors: two weights, the input, two outputs."""
    ink = page.evaluate(INK)
    assert len(ink) == 1 + len({*lab.sim.quantizers.values()})
    assert min(ink) > 2000


def test_the_tables_say_what_the_lab_says(lab: qlab.Lab, page: Page) -> None:
    layers = page.get_by_role("table").filter(has=page.get_by_role("columnheader", name="weight bits"))
    shown = lab.layers().loc[lambda frame: frame["weight_bits"].notna() | frame["output_bits"].notna()]
    expect(layers.locator("tbody tr")).to_have_count(len(shown))
    place = layers.get_by_role("columnheader").all_inner_texts().index("weight bits")
    row = layers.get_by_role("row").filter(has=page.get_by_text("fc", exact=True))
    expect(row.locator("th, td").nth(place)).to_have_text("4")
    sqnr = float(lab.scores["sqnr"].quantized)
    expect(page.get_by_role("row").filter(has_text="SQNR").filter(has_text=f"{sqnr:.4g}").first).to_be_visible()
    expect(page.get_by_text("fc weight bits 4").first).to_be_visible()
    share = lab.histogram("fc", "output").clipped_share  # a range by min_max: nothing, or half a step of one value
    told = (
        "Bokeh.index.roots.map((view) => view.model.title?.text ?? '').filter((text) => text.startsWith('fc output'))"
    )
    assert page.evaluate(told)[0].endswith(f"clips {share:.2%}")
    assert page.locator("pre", has_text="sim['fc'].weight.set(bits=4)").inner_text().strip() == lab.script().strip()


def test_a_hostile_name_is_text(page: Page) -> None:
    expect(page.get_by_text(HOSTILE).first).to_be_visible()
    assert page.evaluate("[window.hacked === undefined, document.querySelectorAll('img[src=x]').length]") == [True, 0]


def test_it_fits_the_window_in_light_and_dark(page: Page) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("Bokeh.documents.every((document) => document.is_idle)")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 1280
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.screenshot(path=SCREENSHOTS / f"saved_lab_{scheme}.png", full_page=True)
    assert grounds[0] != grounds[1]
    page.emulate_media(color_scheme="light")
