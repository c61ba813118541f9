"""Findings of the lab's model, the worst first; a click selects the layer, and names stay text."""

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.graph.findings import Finding, Severity
from qlab.graph.findings import Findings as Found
from qlab.views import Findings

HOSTILE = "<img src=x onerror=hacked=1>"


class Hostile(nn.Module):
    """A layer whose name is markup, called twice, and BatchNorm that nothing can take."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Conv2d(3, 3, 1))
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        conv = getattr(self, HOSTILE)
        return self.bn(conv(conv(x)).sigmoid())


@pytest.fixture(scope="module")
def sim() -> qlab.QuantSim:
    torch.manual_seed(0)
    sim = qlab.QuantSim(Hostile().eval(), torch.randn(2, 3, 4, 4))
    sim.calibrate([torch.randn(2, 3, 4, 4)])
    return sim


@pytest.fixture
def lab(sim, monkeypatch):
    monkeypatch.setenv("QLAB_STRICT", "1")
    return qlab.Lab(sim, [torch.randn(2, 3, 4, 4)])


def test_validate_shows_what_qlab_validate_finds(lab, sim):
    view = Findings(lab)
    assert len(view._rows.children) == 0
    found = view.validate().result()
    wanted = qlab.validate(sim.model, lab.batches.source[0], sim.preset)
    assert [(f.code, f.layer) for f in found] == [(f.code, f.layer) for f in wanted]
    assert view.findings is found
    assert {"QL201", "QL301"} <= {finding.code for finding in found}
    assert len(view._rows.children) == len(found)
    view.close()


def test_a_click_selects_the_layer(lab):
    found = Found([Finding("QL301", Severity.WARNING, "bn", "net.py:3", "bn stays", "why", "mend")])
    view = Findings(lab, found)
    (row,) = view._rows.children
    row.children[0].click()
    assert lab.selected == ("bn",)
    assert "net.py:3" in row.children[1].value
    view.close()


def test_a_finding_on_a_module_selects_its_layers_and_one_without_a_layer_selects_nothing(monkeypatch):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    lab = qlab.Lab(qlab.QuantSim(model, torch.randn(2, 3)), [torch.randn(2, 3)])
    inner = Finding("QL202", Severity.HINT, "0", "", "", "", "")
    nowhere = Finding("QL109", Severity.HINT, None, "", "", "", "")
    view = Findings(lab, Found([inner, nowhere]))
    first, second = (row.children[0] for row in view._rows.children)
    first.click()
    assert lab.selected == ("0.0", "0.1")
    assert second.disabled
    view.close()


def test_names_and_words_of_a_finding_stay_text(lab):
    found = Found([Finding("QL301", Severity.WARNING, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)])
    view = Findings(lab, found)
    (row,) = view._rows.children
    assert "<img" not in row.children[1].value
    assert "&lt;img" in row.children[1].value
    assert "<img" not in view.to_html()
    view.close()


def test_one_severity_is_shown_alone(lab):
    found = Found([Finding("QL1", s, None, "", s.value, "", "") for s in Severity])
    view = Findings(lab, found)
    assert len(view._rows.children) == 3
    view._shown.label = "warnings"
    (row,) = view._rows.children
    assert "warning" in row.children[1].value
    view.close()


def test_after_an_edit_it_says_that_the_findings_are_of_an_earlier_state(lab):
    view = Findings(lab, Found())
    assert "earlier state" not in view._said.value
    lab.set("bn", "output", bits=6)
    assert "earlier state" in view._said.value
    lab.undo()
    assert "earlier state" not in view._said.value
    view.close()
