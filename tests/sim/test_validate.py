"""Rules that need a preset, and the guide: every code has its section and every section a rule."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import CaptureError, SpecError
from qlab.graph.findings import Severity
from qlab.sim.validate import ALL_RULES
from tests.graph.models import Attention, Branching, Recurrent

GUIDE = Path(qlab.__file__).parent.parent / "docs" / "validator.md"
X, IMAGE = torch.randn(4, 3), torch.randn(2, 3, 6, 6)


def spread(layer: nn.Module, factor: float) -> nn.Module:
    """The layer with half of its output channels made smaller."""
    with torch.no_grad():
        layer.weight.clamp_(0.1, 0.2)
        layer.weight[::2] /= factor
    return layer


def depthwise(factor: float, after: nn.Module) -> nn.Module:
    middle = spread(nn.Conv2d(32, 32, 3, groups=32), factor)
    return nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), middle, after, nn.Conv2d(32, 4, 1))


CASES = {
    "QL303": (nn.Sequential(spread(nn.Linear(3, 32), 50), nn.Sigmoid()), X, spread(nn.Linear(3, 32), 5), X),
    "QL304": (depthwise(50, nn.ReLU()), IMAGE, depthwise(5, nn.ReLU()), IMAGE),
    "QL401": (Recurrent(), torch.randn(2, 5, 6), nn.Sequential(nn.Linear(3, 32)), X),
    "QL402": (
        nn.Sequential(nn.EmbeddingBag(9, 32)),
        torch.randint(0, 9, (2, 4)),
        nn.Sequential(nn.Embedding(9, 32)),
        torch.randint(0, 9, (2, 4)),
    ),
    "QL403": (Attention(), torch.randn(2, 5, 8), nn.Sequential(nn.Linear(3, 32)), X),
}


@pytest.mark.parametrize("code", CASES)
def test_a_rule_finds_what_it_looks_for_and_nothing_else(code):
    model, example, clean, clean_example = CASES[code]
    found = qlab.validate(model, example).where(code)
    assert found
    assert all(finding.what and finding.why and finding.remedy and finding.layer for finding in found)
    assert not qlab.validate(clean, clean_example).where(code)


def test_ranges_that_equalization_reaches_are_left_to_it():
    reached = nn.Sequential(spread(nn.Linear(3, 32), 50), nn.ReLU(), nn.Linear(32, 3))
    assert not qlab.validate(reached, X).where("QL303")


def test_the_spread_is_that_of_the_weight_with_batch_norm_folded_in():
    model = nn.Sequential(spread(nn.Conv2d(3, 32, 1), 1), nn.BatchNorm2d(32), nn.Sigmoid())
    assert not qlab.validate(model, IMAGE).where("QL303")
    with torch.no_grad():
        model[1].weight[::2] = 0.01
    (found,) = qlab.validate(model, IMAGE).where("QL303")
    assert "16 of 32 channels" in found.what


def test_one_grid_a_channel_silences_what_it_mends():
    model = depthwise(50, nn.Sigmoid())
    assert qlab.validate(model, IMAGE).where("QL304")
    assert not qlab.validate(model, IMAGE, qlab.presets.w8a8(per_channel=True)).where("QL304")


def test_a_depthwise_layer_that_nothing_equalizes_is_told_to_have_a_grid_a_channel():
    (linked,) = qlab.validate(depthwise(50, nn.ReLU()), IMAGE).where("QL304")
    assert "CrossLayerEqualization" in linked.remedy
    alone = nn.Sequential(nn.Sigmoid(), depthwise(50, nn.ReLU())[2], nn.Sigmoid())
    (found,) = qlab.validate(alone, torch.randn(2, 32, 6, 6)).where("QL304")
    assert "CrossLayerEqualization" not in found.remedy
    assert 'sim["1"].weight' in found.remedy


def test_what_the_preset_keeps_in_float_is_a_hint():
    model = nn.Sequential(nn.Linear(3, 32), nn.Sigmoid())
    (found,) = qlab.validate(model, X, qlab.presets.w8a8(skip=["0"])).where("QL401")
    assert (found.layer, found.severity) == ("0", Severity.HINT)
    (recurrent,) = qlab.validate(Recurrent(), torch.randn(2, 5, 6)).where("QL401")
    assert (recurrent.layer, recurrent.severity) == ("lstm.lstm", Severity.WARNING)
    assert "several tensors" in recurrent.what


def test_sizes_computed_in_forward_are_no_layers_in_float():
    assert not qlab.validate(Attention(), torch.randn(2, 5, 8)).where("QL401")


def test_ok_says_whether_a_sim_can_be_made():
    assert qlab.validate(Recurrent(), torch.randn(2, 5, 6)).ok
    qlab.QuantSim(Recurrent(), torch.randn(2, 5, 6))
    assert not qlab.validate(Branching(), X).ok
    with pytest.raises(CaptureError):
        qlab.QuantSim(Branching(), X)


def test_every_code_has_its_section_and_every_section_a_rule():
    sections = re.findall(r"^## (QL\d+) (.+)$", GUIDE.read_text(), re.MULTILINE)
    assert sorted(sections) == sorted((rule.code, rule.title) for rule in ALL_RULES)


def test_what_is_no_preset_is_refused():
    with pytest.raises(SpecError, match=r"qlab\.presets\.w8a8\(\); got 'w8a8'"):
        qlab.validate(nn.Linear(3, 3), X, "w8a8")


def test_codes_are_given_once():
    codes = [rule.code for rule in ALL_RULES]
    assert len(codes) == len(set(codes))
