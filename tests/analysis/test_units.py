"""What is switched together: fused groups, shared grids, tied weights."""

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.analysis import units_of
from qlab.analysis.units import acting_layers, chosen_units
from qlab.errors import UnknownLayer
from tests.analysis.small import calibrated


def test_a_fused_group_is_one_unit_and_a_concatenation_ties_its_inputs():
    sim = calibrated()
    units = {unit.layer: unit for unit in units_of(sim)}
    assert list(units) == ["x", "stem.0", "depthwise.0", "add", "left", "mean", "head"]
    assert units["stem.0"].layers == ("stem.0", "stem.1", "stem.2")
    assert units["stem.0"].tensors == (("stem.0", "weight"), ("stem.2", "output"))
    assert units["left"].layers == ("left", "right")
    assert set(units["left"].tensors) == {("left", "weight"), ("left", "output"), ("right", "weight")}
    keys = [key for unit in units.values() for key in unit.quantizers]
    assert sorted(keys) == sorted(sim.quantizers)  # each quantizer in exactly one unit


def test_quantizers_can_be_kept_apart():
    sim = calibrated()
    units = units_of(sim, by="quantizer")
    assert [(str(unit), len(unit.quantizers)) for unit in units][:4] == [
        ("x output", 1),
        ("stem.0 weight", 1),
        ("stem.2 output", 1),
        ("depthwise.0 weight", 1),
    ]
    assert sorted(key for unit in units for key in unit.quantizers) == sorted(sim.quantizers)


def test_tied_weights_are_switched_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.sigmoid(self.first(x)))

    sim = qlab.QuantSim(Tied(), torch.randn(4, 6))
    unit = next(unit for unit in units_of(sim) if unit.layer == "first")
    assert unit.layers == ("first", "second")
    assert acting_layers(sim, [key for key in unit.quantizers if key.endswith("weight")]) == ["first", "second"]


def test_what_is_off_belongs_to_no_unit_and_globs_find_any_member():
    sim = calibrated()
    sim["head"].weight.enabled = sim["head"].output.enabled = False
    sim["stem.0"].weight.enabled = False
    units = units_of(sim)
    assert "head" not in [unit.layer for unit in units]
    stem = next(unit for unit in units if "stem.2" in unit.layers)
    assert stem.tensors == (("stem.2", "output"),)
    assert [unit.layer for unit in chosen_units(units, sim, "depth*.1, mean")] == ["depthwise.0", "mean"]
    with pytest.raises(UnknownLayer, match="matches no layer"):
        chosen_units(units, sim, ["mean", "stam.*"])
