"""The pane's half of the protocol: patches, batches, echoes, snapshots, disposal."""

import base64
import gzip
import json
import re
from pathlib import Path

import bokeh
import numpy as np
import pytest
from bokeh.document import Document
from bokeh.models import ColumnDataSource, Div
from bokeh.plotting import figure

from qlab.views.bokeh_pane import BokehJS, BokehPane


@pytest.fixture
def source() -> ColumnDataSource:
    return ColumnDataSource({"x": [0, 1], "y": [3.0, 4.0]})


@pytest.fixture
def plot(source):
    plot = figure(title="before")
    plot.scatter("x", "y", source=source)
    return plot


def replay(pane: BokehPane, snapshot: str, sent: list) -> Document:
    """What a browser that took the snapshot and all messages since would hold."""
    document = Document.from_json(json.loads(snapshot))
    for message, _ in sent:
        document.apply_json_patch(json.loads(message["patch"]))
    return document


def test_patches_bring_a_snapshot_up_to_date(plot, source, sent):
    pane = BokehPane(plot)
    snapshot = pane.take_snapshot()
    plot.title.text = "after"
    source.data = {"x": [0], "y": [9.0]}
    with pane.batch():
        source.stream({"x": [1], "y": [8.0]})
        source.patch({"y": [(0, 7.0)]})
    copy = replay(pane, snapshot, sent)
    assert len(sent) == 3
    assert copy.select_one({"type": type(plot)}).title.text == "after"
    assert list(copy.get_model_by_id(source.id).data["y"]) == [7.0, 8.0]


def test_streaming_new_data_within_a_batch_shows_it_once(plot, source, sent):
    pane = BokehPane(plot)
    snapshot = pane.take_snapshot()
    with pane.batch():
        source.data = {"x": [0], "y": [1.0]}
        source.stream({"x": [1], "y": [2.0]})
    copy = replay(pane, snapshot, sent)
    assert list(copy.get_model_by_id(source.id).data["y"]) == [1.0, 2.0]


def test_a_batch_is_one_message_and_keeps_the_last_of_each_value(plot, sent):
    pane = BokehPane(plot)
    with pane.batch():
        plot.title.text = "one"
        with pane.batch():
            plot.title.text = "two"
        plot.title.text = "three"
    assert len(sent) == 1
    events = json.loads(sent[0][0]["patch"])["events"]
    assert [event["new"] for event in events] == ["three"]


def test_an_exception_inside_a_batch_still_sends_what_changed(plot, sent):
    pane = BokehPane(plot)

    def half_done():
        with pane.batch():
            plot.title.text = "half"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_done()
    plot.title.text = "later"
    assert len(sent) == 2


def test_an_empty_batch_sends_nothing(plot, sent):
    with BokehPane(plot).batch():
        pass
    assert sent == []


def test_arrays_travel_as_buffers(plot, source, sent):
    pane = BokehPane(plot)
    values = np.arange(1000.0)
    source.data = {"x": values, "y": values}
    message, buffers = sent[0]
    assert [len(buffer) for buffer in buffers] == [8000, 8000]
    assert len(message["buffers"]) == 2
    assert len(message["patch"]) < 2000
    assert pane.take_snapshot()


def select(plot_source: ColumnDataSource, indices: list[int]) -> dict:
    event = {"kind": "ModelChanged", "model": {"id": plot_source.selected.id}, "attr": "indices", "new": indices}
    return {"kind": "patch", "patch": {"events": [event]}}


def test_a_selection_from_the_browser_calls_back_once_and_is_not_echoed(plot, source, sent, from_browser):
    pane = BokehPane(plot)
    calls = []
    source.selected.on_change("indices", lambda attr, old, new: calls.append(list(new)))
    from_browser(pane, select(source, [1]))
    assert calls == [[1]]
    assert sent == []


def test_what_a_callback_changes_is_sent(plot, source, sent, from_browser):
    pane = BokehPane(plot)
    source.selected.on_change("indices", lambda attr, old, new: setattr(plot.title, "text", f"row {new[0]}"))
    from_browser(pane, select(source, [1]))
    assert len(sent) == 1
    assert "row 1" in sent[0][0]["patch"]


def test_an_exception_in_a_callback_is_shown_and_then_forgotten(plot, source, from_browser):
    pane = BokehPane(plot)

    def fail(attr, old, new):
        if new == [1]:
            raise RuntimeError("no such layer")

    source.selected.on_change("indices", fail)
    from_browser(pane, select(source, [1]))
    assert pane.alert == "RuntimeError: no such layer"
    from_browser(pane, select(source, [0]))
    assert pane.alert == ""


def test_two_panes_of_one_document_follow_each_other(plot, source, sent, from_browser):
    first, _second = BokehPane(plot), BokehPane(plot)
    from_browser(first, select(source, [1]))
    assert len(sent) == 1


def test_every_request_for_the_state_gets_the_current_document(plot):
    pane = BokehPane(plot)
    plot.title.text = "now"
    assert "now" in pane.get_state("_snapshot")["_snapshot"]
    assert "now" in pane.get_state()["_snapshot"]


def test_a_browser_that_lost_its_way_gets_the_whole_document(plot, sent, from_browser):
    pane = BokehPane(plot)
    from_browser(pane, {"kind": "resync"})
    assert sent[0][0] == {"kind": "document", "document": pane.take_snapshot()}


def test_bokehjs_is_carried_once(plot):
    panes = [BokehPane(plot), BokehPane(figure())]
    assert panes[0]._bokehjs is panes[1]._bokehjs
    carrier = BokehJS.of_this_kernel()
    code = Path(bokeh.__file__).parent / "server/static/js/bokeh.min.js"
    assert gzip.decompress(carrier.code) == code.read_bytes()
    carrier.close()
    assert BokehPane(figure())._bokehjs.comm is not None


def test_a_closed_pane_no_longer_listens(plot, sent):
    pane = BokehPane(plot)
    pane.close()
    pane.close()
    plot.title.text = "unheard"
    assert sent == []


def test_a_reader_without_a_kernel_sees_the_fallback(plot):
    pane = BokehPane(plot, label="SQNR of <conv1>: 34.1 dB", fallback=lambda: "<svg></svg>")
    data, _ = pane._repr_mimebundle_()
    assert data["text/plain"] == "BokehPane('SQNR of <conv1>: 34.1 dB')"
    picture = re.search(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]+)">', data["text/html"])
    assert picture[1] == "SQNR of &lt;conv1&gt;: 34.1 dB"
    assert base64.b64decode(picture[2]) == b"<svg></svg>"
    assert "SQNR of &lt;conv1&gt;: 34.1 dB" in data["text/html"]
    assert len(json.dumps(data)) < 2000


def test_a_figure_of_another_document_is_refused(plot):
    document = Document()
    document.add_root(plot)
    document.add_root(figure())
    with pytest.raises(ValueError, match="2 roots"):
        BokehPane(plot)
    assert BokehPane(document).document is document


def test_bokeh_inputs_are_refused():
    document = Document()
    document.add_root(Div(text="hello"))
    with pytest.raises(ValueError, match="Div"):
        BokehPane(document)
