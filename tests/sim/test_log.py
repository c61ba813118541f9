"""The log of a sim: what was done to it as a whole, so that it can be told and done again."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import qlab
from qlab.progress import Progress
from qlab.sim import Batches, QuantSim
from qlab.sim.log import Marks
from qlab.techniques import Report, Technique


@dataclass(frozen=True)
class _Outer(Technique):
    fails: bool = False

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        sim.calibrate(batches)
        with torch.no_grad():
            next(sim.model.parameters()).mul_(2)
        if self.fails:
            raise RuntimeError("boom")
        return Report("_Outer", "doubled a weight")


@pytest.fixture
def data() -> list[torch.Tensor]:
    return [torch.randn(4, 3)]


@pytest.fixture
def sim(data: list[torch.Tensor]) -> QuantSim:
    return QuantSim(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), data[0])


def test_calibrations_and_techniques_are_logged_with_what_they_were_given(sim: QuantSim, data) -> None:
    sim.calibrate(data)
    sim["0"].weight.bits = 4
    technique = _Outer()
    technique.apply(sim, data)
    assert [entry.what for entry in sim.log] == ["new", "calibrate", technique]
    assert sim.log[1].batches is data
    assert sim.log[1].after.settings["0:weight"].spec.bits == 8
    assert sim.log[2].before.settings["0:weight"].spec.bits == 4
    assert sim.log[2].before.weights != sim.log[2].after.weights


def test_what_fails_or_is_restored_is_not_in_the_log(sim: QuantSim, data) -> None:
    sim.calibrate(data)
    with pytest.raises(RuntimeError):
        _Outer(fails=True).apply(sim, data)
    assert [entry.what for entry in sim.log] == ["new", "calibrate"]


def test_a_copy_has_the_same_past_and_shares_its_data(sim: QuantSim, data) -> None:
    sim.calibrate(data)
    twin = copy.deepcopy(sim)
    twin.calibrate(data)
    assert twin.log[1] is sim.log[1]
    assert len(sim.log) == 2
    assert len(twin.log) == 3


def test_a_loaded_sim_begins_with_its_file(sim: QuantSim, data, tmp_path) -> None:
    sim.calibrate(data)
    sim.save(tmp_path / "a.safetensors")
    loaded = qlab.load(tmp_path / "a.safetensors", sim.model, data[0])
    assert [(entry.what, entry.batches) for entry in loaded.log] == [("load", str(tmp_path / "a.safetensors"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_marks_notice_a_change_of_one_bit(dtype: torch.dtype, size: int, sim: QuantSim) -> None:
    sim.model.register_buffer("extra", torch.ones(size).to(dtype))
    before = Marks.of(sim).weights
    assert Marks.of(sim).weights == before
    bits = sim.model.extra.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    bits[-1] ^= 1
    assert Marks.of(sim).weights != before
