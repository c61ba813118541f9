"""A saved analysis is one page that asks for nothing, and JSON that holds what the tables hold."""

import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import qlab
from tests.analysis.small import calibrated, data

TABLES = ("summary", "enabled", "disabled", "noise", "estimate", "correlation", "ranges", "histograms")


@pytest.fixture(scope="module")
def analysis():
    labelled = data()
    analyzer = qlab.QuantAnalyzer(bits=(None, 3), layers="stem.*, head")
    return analyzer.measure(calibrated(), labelled, qlab.SQNR(labelled))


@pytest.fixture(scope="module")
def saved(analysis, tmp_path_factory):
    return analysis.save(tmp_path_factory.mktemp("report") / "report.html")


class Page(HTMLParser):
    """The addresses that a page's tags name, its headings and the text of its tables."""

    def __init__(self, page: str):
        super().__init__()
        self.addresses, self.headings, self.cells, self.figures = [], [], [], 0
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._open = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.figures += dict(attrs).get("class") == "qlab-plot"

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, text):
        if self._open in ("td", "th"):
            self.cells.append(text)
        elif self._open == "h2":
            self.headings.append(text)


def test_the_page_holds_all_it_needs(saved):
    text = saved.read_text()
    page = Page(text)
    assert not [address for address in page.addresses if not address.startswith("#")]
    assert not re.findall(r"@import|url\(\s*['\"]?(?!data:|#)", text.partition("<body")[0].partition("<script")[0])
    assert "default-src 'none'" in text
    assert page.figures == 7  # summary, enabled, disabled, noise, estimate, two of ranges
    assert page.headings == [
        "Weights or activations",
        "Only this layer quantized",
        "All but this layer quantized",
        "Noise of layers",
        "Estimate",
        "Ranges of channels",
    ]
    assert {"stem.0", "head", "depthwise.0"} <= set(page.cells)
    assert sorted(os.listdir(saved.parent)) == ["report.html", "report.json"]


def number(value):
    return math.nan if value is None else float(value) if value in ("inf", "-inf") else value


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_can_be_read_back(analysis, saved, name):
    found = json.loads(saved.with_suffix(".json").read_text(), parse_constant=pytest.fail)[name]
    wanted = getattr(analysis, name)
    rows = [[number(value) for value in row] for row in found["rows"]]
    table = pd.DataFrame(rows, columns=found["columns"]).astype(wanted.dtypes.to_dict())
    pd.testing.assert_frame_equal(table, wanted, check_exact=True)
    assert len(table)


def test_whoever_may_read_the_page_may_read_its_tables(saved):
    assert saved.with_suffix(".json").stat().st_mode == saved.stat().st_mode


def test_the_head_says_what_was_measured(analysis, saved):
    found = json.loads(saved.with_suffix(".json").read_text())
    assert found["score"] == {"name": "SQNR", "unit": "dB"}
    assert found["bits"] == ["as set", "3"]
    assert found["samples"] == analysis.samples == 31
    assert found["forwards"] == analysis.work.forwards < found["forwards_of_full_runs"]
    assert [unit["layer"] for unit in found["units"]] == ["stem.0", "head"]


def test_rows_without_a_score_are_shown_and_saved(tmp_path):
    def fragile(model):
        on = [q.name for q in model.quantizers.values() if q.enabled]
        return math.nan if on and set(on) <= {"head"} else float(len(on))

    analysis = qlab.QuantAnalyzer(estimate=False, probe_batches=1).measure(calibrated(), data(), fragile)
    path = analysis.save(tmp_path / "report.html")
    assert "the score is not a number" in Page(path.read_text()).cells
    rows = json.loads(path.with_suffix(".json").read_text())["enabled"]
    table = pd.DataFrame(rows["rows"], columns=rows["columns"]).set_index("layer")
    assert table.score["head"] is None or np.isnan(table.score["head"])
    assert table.note["head"] == "the score is not a number"


def test_a_place_that_cannot_be_written_is_said_and_nothing_is_left(analysis, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write to '.*missing'.*Choose a folder that exists"):
        analysis.save(tmp_path / "missing" / "report.html")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="Choose a folder"):
        analysis.save(tmp_path / "file" / "report.html")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_keeps_the_earlier_report(analysis, tmp_path, monkeypatch):
    path = analysis.save(tmp_path / "report.html")
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        analysis.save(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]
