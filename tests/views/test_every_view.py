"""What holds for every view: it is built from a lab alone, follows it, reads without a kernel, and leaves nothing."""

import re

import ipywidgets
import pytest
import torch
from ipywidgets.widgets.widget import _instances
from torch import Tensor, nn

import qlab
import qlab.views
from qlab.views import BokehPane, Dashboard, View

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
    lab = qlab.Lab(sim, batches)
    lab.set(HOSTILE, "weight", bits=4)
    lab.select(HOSTILE)
    lab.measure().result()
    yield lab
    lab.measure().result()
    lab.go_to(0)


def _no_noise():
    import pandas as pd

    return pd.DataFrame({"layer": [], "sqnr": []})


def listeners(lab) -> dict[str, int]:
    return {name: len(getattr(lab.events, name)) for name in SIGNALS}


def markup(widget: ipywidgets.Widget) -> list[str]:
    """Everything that a view would put into the page as HTML."""
    if isinstance(widget, ipywidgets.Box):
        return [text for child in widget.children for text in markup(child)]
    return [widget.value] if isinstance(widget, ipywidgets.HTML) else []


def test_all_views_are_found():
    assert {"Dashboard", "LayerTable", "Histogram", "TechniqueForm", "GraphView"} <= {view.__name__ for view in VIEWS}


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
