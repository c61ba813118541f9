"""A report is one file that loads nothing, escapes every name, and is never left half written."""

import os
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from bokeh.document import Document
from bokeh.plotting import figure

from qlab import plots


class Page(HTMLParser):
    """The tags of a page, its scripts, and the text outside scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = self._open = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def page(all_plots, hostile, tmp_path_factory) -> Page:
    table = pd.DataFrame({hostile: [hostile, "b"], "score": [0.123456, np.nan], "bits": [8, 4]})
    table.attrs["caption"] = hostile
    sections = [
        plots.Section("Figures", tuple(all_plots)),
        plots.Section(hostile, (f"{hostile}\n\nsecond", table)),
        plots.Section("Third"),
    ]
    return Page(plots.save_html(tmp_path_factory.mktemp("report") / "report.html", hostile, sections).read_text())


def test_nothing_is_loaded_from_anywhere(page):
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "data", "action") if name in attrs]
    assert len(addresses) == 3  # the contents' links
    assert not [address for address in addresses if not address.startswith("#")]


def test_the_page_itself_forbids_requests(page):
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    sources = {word for part in policy.split(";") for word in part.split()[1:]}
    assert policy.startswith("default-src 'none'")
    assert sources <= {"'none'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}


def test_hostile_names_are_text_everywhere(page, hostile):
    assert page.count("img") == 0
    assert page.text.count(hostile) == 8  # title, its heading, contents, heading, text, caption, column, cell
    assert not [script for script in page.scripts if script.startswith("alert")]


def test_figures_cannot_break_out_of_the_script_that_carries_them(example, hostile, tmp_path):
    harmless, dangerous = (
        Page(example([name, "fc"]).save(tmp_path / "x.html").read_text()) for name in ("conv1", hostile)
    )
    assert [tag for tag, _ in dangerous.tags] == [tag for tag, _ in harmless.tags]


def test_the_figures_are_in_the_page(page, all_plots):
    assert sum(attrs.get("class") == "qlab-plot" for _, attrs in page.tags) == len(all_plots)


def test_tables_show_four_digits_and_a_dash_for_what_is_missing(page):
    assert "0.1235" in page.text
    assert "–" in page.text


def test_headings_are_linked(page):
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == [f"#{attrs['id']}" for tag, attrs in page.tags if tag == "h2"]


def test_a_page_without_figures_carries_no_library(tmp_path):
    path = plots.save_html(tmp_path / "x.html", "words", [plots.Section("Only", ("text",))])
    assert path.stat().st_size < 5_000


def test_a_plain_bokeh_figure_can_stand_in_a_section(tmp_path):
    path = plots.save_html(tmp_path / "x.html", "t", [plots.Section("", (figure(title="plain words"),))])
    assert "plain words" in path.read_text()


def test_saving_a_live_figure_leaves_it_in_its_document(all_plots, tmp_path):
    live = plots.noise(pd.DataFrame({"layer": ["a"], "sqnr": [1.0]}))
    document = Document()
    document.add_root(live.figure)
    page = Page(plots.save_html(tmp_path / "x.html", "t", [plots.Section("", (live, all_plots[0]))]).read_text())
    assert sum(attrs.get("class") == "qlab-plot" for _, attrs in page.tags) == 2
    assert live.figure.document is document
    assert document.roots == [live.figure]


def test_a_figure_that_stands_twice_is_refused(all_plots, tmp_path):
    with pytest.raises(ValueError, match="stands twice"):
        plots.save_html(tmp_path / "x.html", "t", [plots.Section("", (all_plots[0], all_plots[0]))])


def test_a_failure_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = plots.save_html(tmp_path / "x.html", "first", [])
    old = path.read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match="No space"):
        plots.save_html(path, "second", [])
    assert path.read_text() == old
    assert os.listdir(tmp_path) == ["x.html"]


def test_a_folder_that_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write '.*x\.html'.*Choose a folder that exists"):
        plots.save_html(tmp_path / "missing" / "x.html", "title", [])


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(TypeError, match="text, DataFrames and figures, not dict"):
        plots.save_html(tmp_path / "x.html", "title", [plots.Section("a", ({},))])
    assert not list(tmp_path.iterdir())


def test_code_keeps_its_lines_and_is_escaped(tmp_path):
    code = plots.Code("for name in ['a']:\n    sim[name] = '<b>'\n")
    page = Page(plots.save_html(tmp_path / "page.html", "Report", [plots.Section("Code", (code,))]).read_text())
    assert page.count("pre") == 1
    assert page.count("b") == 0
    assert code in page.text
