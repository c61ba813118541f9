"""What holds for every view: it is built from a lab alone, follows it, reads without a kernel, and leaves nothing."""

import re
from dataclasses import dataclass

import ipywidgets
import pandas as pd
import pytest
import torch
from bokeh.models import ColumnDataSource
from ipywidgets.widgets.widget import _instances
from torch import Tensor, nn

import qlab
import qlab.views
from qlab.settings import setting
from qlab.techniques import TECHNIQUES, Report, Technique
from qlab.views import BokehPane, Dashboard, View
from qlab.views.view import escape

HOSTILE = "<img src=x onerror=hacked=1>"
RAW = re.compile(r"<img src=x", re.IGNORECASE)
VIEWS = [
    view for view in vars(qlab.views).values() if isinstance(view, type) and issubclass(view, View) and view is not View
]
SIGNALS = (
    "edited",
    "selected",
    "scores",
    "noise",
    "job_started",
    "job_progress",
    "job_ended",
    "history_changed",
    "error",
)


WORK = {
    "Diagnosis": lambda view: view.diagnose(),
    "Export": lambda view: view.export(),
    "Findings": lambda view: view.validate(),
    "Guidebook": lambda view: view.guide.start("layers"),
    "Pareto": lambda view: view.find(),
    "Sensitivity": lambda view: view.measure(),
    "Stages": lambda view: view.find(),
    "TechniqueForm": lambda view: view.run(),
    "Training": lambda view: view.subject.start(qlab.QAT(), batches=labelled(view.subject)),
}
"""What a person starts in a view before it shows anything: its job."""
ELSEWHERE = {"BokehPane", "LayerGrid", "SettingsForm"}
"""Widgets that are no views: tested in files of their own, and here within the views that use them."""


class Hostile(nn.Module):
    """Layers whose names are markup."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Conv2d(3, 4, 3))
        self.add_module("fc", nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(getattr(self, HOSTILE)(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3, 8, 8)]


@pytest.fixture(scope="module")
def sim(batches) -> qlab.QuantSim:
    sim = qlab.QuantSim(Hostile().eval(), batches[0], qlab.presets.w8a8())
    sim.calibrate(batches)
    return sim


@pytest.fixture
def lab(sim, batches, monkeypatch):
    """A lab of hostile names, with a history, measured."""
    monkeypatch.setenv("QLAB_STRICT", "1")
    BokehPane(qlab.plots.noise(_no_noise()).figure).close()  # BokehJS stays, once a kernel
    lab = qlab.Lab(sim, batches, score=qlab.Score(lambda model: 0.5, name=f"score {HOSTILE}"))
    lab.set(HOSTILE, "weight", bits=4)
    lab.select(HOSTILE)
    lab.measure().result()
    yield lab
    settle(lab)
    lab.go_to(0)


def settle(lab) -> None:
    """Wait for the work that was started and for what follows from it."""
    while lab.jobs:
        lab.jobs[-1].result()


def labelled(lab) -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in lab.batches]


def _no_noise():
    return pd.DataFrame({"layer": [], "sqnr": []})


def listeners(lab) -> dict[str, int]:
    return {name: len(getattr(lab.events, name)) for name in SIGNALS}


def markup(widget: ipywidgets.Widget) -> list[str]:
    """Everything that a view would put into the page as HTML."""
    if isinstance(widget, ipywidgets.Box):
        return [text for child in widget.children for text in markup(child)]
    return [widget.value] if isinstance(widget, ipywidgets.HTML) else []


def shown_by(view: View) -> list[str]:
    """Everything that a view shows: as markup, as a still picture, and in its figures."""
    panes = [pane for pane in widgets_of(view) if isinstance(pane, BokehPane)]
    sources = [source for pane in panes for source in pane.document.select({"type": ColumnDataSource})]
    return [*markup(view), view.to_html(), *(escape(str(source.data)) for source in sources)]


def widgets_of(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    inner = widget.children if isinstance(widget, ipywidgets.Box) else ()
    return [widget, *(one for child in inner for one in widgets_of(child))]


def test_all_that_qlab_views_offers_is_tested():
    classes = {name for name in qlab.views.__all__ if isinstance(getattr(qlab.views, name), type)}
    assert classes - {"View", "Column"} - ELSEWHERE == {view.__name__ for view in VIEWS}
    assert {tab.factory for tab in qlab.views.TABS.values()} <= set(VIEWS)
    assert {view.__name__ for view in VIEWS} >= WORK.keys()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_it_is_built_updated_and_closed_without_a_trace(lab, view):
    before, widgets = listeners(lab), len(_instances)
    shown = view(lab)
    assert shown.comm is not None
    lab.set("fc", "weight", bits=6)
    lab.select(["fc"])
    lab.measure().result()
    lab.undo()
    assert shown.frame.error is None
    shown.close()
    shown.close()
    lab.live = False
    assert listeners(lab) == before
    assert len(_instances) == widgets


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_names_stay_text(lab, view):
    shown = view(lab)
    if isinstance(shown, Dashboard):
        for title in list(qlab.views.TABS):
            shown.show(title)
    texts = [*markup(shown), shown.to_html()]
    shown.close()
    assert not [text for text in texts if RAW.search(text)]


@pytest.mark.parametrize("view", [view for view in VIEWS if view.__name__ in WORK], ids=lambda view: view.__name__)
def test_what_its_work_finds_stays_text(lab, view, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = view(lab)
    if isinstance(shown, qlab.views.Export):
        shown._path.value = HOSTILE
    WORK[view.__name__](shown).result()
    settle(lab)
    texts = shown_by(shown)
    shown.close()
    lab.live = False
    assert not [text for text in texts if RAW.search(text)]
    assert [text for text in texts if "&lt;img src=x" in text] or view.__name__ == "Pareto"  # which names no layer


def test_what_the_target_and_others_encodings_say_stays_text(lab, tmp_path):
    shown = qlab.views.Export(lab, str(tmp_path / HOSTILE))
    shown.export().result()
    lab.set(HOSTILE, "weight", bits=5)
    shown._layers.value, shown._other.value = True, str(tmp_path / f"{HOSTILE}.encodings")
    shown.check().result()
    shown.compare().result()
    texts = [shown._target.value, shown._compared.value]
    shown.close()
    assert not [text for text in texts if RAW.search(text)]
    assert all("&lt;img src=x" in text for text in texts)


def test_a_technique_of_a_cell_stays_text(lab):
    """Its name, its words, its settings and their help, and what it reports."""

    def run(self, sim, batches, score, progress):
        return Report(HOSTILE, HOSTILE, ({HOSTILE: HOSTILE},))

    space = {"__doc__": f"{HOSTILE}\n\n{HOSTILE}", "__annotations__": {"steps": int}, "run": run, "deprecated": HOSTILE}
    space["steps"] = setting(1, HOSTILE, minimum=1, unit=HOSTILE)
    technique = dataclass(frozen=True)(type(HOSTILE, (Technique,), space))
    try:
        shown = qlab.views.TechniqueForm(lab, technique)
        panel = qlab.views.JobPanel(lab)
        shown.run().result()
    finally:
        del TECHNIQUES[HOSTILE]
    texts = [*markup(shown), shown.to_html(), *markup(panel), panel.to_html()]
    shown.close()
    panel.close()
    assert not [text for text in texts if RAW.search(text)]
    assert len([text for text in texts if "&lt;img src=x" in text]) >= 5


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_what_a_failed_job_says_stays_text(lab, view):
    """Title, progress, exception and traceback of work that a person started."""

    def fails(sim, progress):
        progress.step(1, 2, HOSTILE)
        raise RuntimeError(HOSTILE)

    fails.__name__ = HOSTILE
    shown = view(lab)
    job = lab.start(fails)
    with pytest.raises(RuntimeError, match="<img"):
        job.result()
    texts = [*markup(shown), shown.to_html()]
    shown.close()
    lab.live = False
    assert not [text for text in texts if RAW.search(text)]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_it_reads_without_a_kernel(lab, view):
    shown = view(lab)
    data, _ = shown._repr_mimebundle_()
    assert data["text/plain"] == shown.summary()
    assert "\n" not in data["text/plain"]
    assert "<script" not in data["text/html"]
    shown.close()


def test_the_hostile_name_is_there_to_be_seen(lab):
    """Else the test above would pass on views that show no names."""
    shown = Dashboard(lab)
    html = shown.to_html()
    shown.close()
    assert "&lt;img src=x" in html
