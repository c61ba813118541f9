"""A model several times the memory allowed is calibrated and rounded; what is mapped is what it was, bit for bit."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import InputError
from qlab.mapped import duplicate, in_file, is_mapped
from qlab.sim.tensor_file import write_tensors
from tests.scale import larger_than_memory
from tests.scale.larger_than_memory import BLOCK_BYTES, network


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)
        self.back = nn.Linear(4, 6)
        self.again = nn.Linear(6, 4, bias=False)
        self.again.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.relu(self.back(self.norm(self.embed(x)))))


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Tied().eval()
    model.norm.running_var.uniform_(0.5, 2)
    path = tmp_path / "weights.safetensors"
    write_tensors(path, dict(model.state_dict()), {})
    return model, path


def mapped(path) -> nn.Module:
    with torch.device("meta"):
        model = Tied().eval()
    qlab.map_weights(model, path)
    return model


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from /proc")
def test_peak_memory_is_that_of_a_block_and_the_budget_whatever_the_size_of_the_model(tmp_path):
    blocks, budget = 16, 16 << 20
    path = tmp_path / "large.safetensors"
    write_tensors(path, dict(network(blocks).state_dict()), {})
    assert path.stat().st_size > 5 * (2 * BLOCK_BYTES + budget)
    run = subprocess.run(
        [sys.executable, larger_than_memory.__file__, path, str(budget), str(blocks)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"},
    )
    peaks = json.loads(run.stdout)
    for stage in ("captured", "calibrated", "run", "rounded"):
        assert peaks["large"][stage] < 2 * BLOCK_BYTES + budget, peaks


def test_a_mapped_model_computes_calibrates_and_rounds_as_one_in_memory(saved):
    model, path = saved
    lazy, batches = mapped(path), [torch.randn(16, 6) for _ in range(3)]
    sims = []
    for each in (model, lazy):
        sim = qlab.QuantSim(each, batches[0], qlab.presets.w4a8())
        sim.calibrate(batches, max_bytes=None if each is model else 1000)
        qlab.AdaRound().apply(sim, batches)
        sims.append(sim)
    plain, sim = sims
    assert torch.equal(lazy(batches[0]), model(batches[0]))
    assert torch.equal(sim(batches[0]), plain(batches[0]))
    assert lazy.again.weight is lazy.embed.weight
    assert is_mapped(sim["embed"].weight.weight)
    assert is_mapped(sim["embed"].weight.rounding)
    twin = copy.deepcopy(sim)
    assert torch.equal(twin(batches[0]), plain(batches[0]))
    assert is_mapped(twin["embed"].weight.weight)


def test_what_is_written_stays_in_memory_and_never_reaches_file_or_model(saved):
    model, path = saved
    before, lazy = path.read_bytes(), mapped(path)
    sim = qlab.QuantSim(lazy, torch.randn(4, 6))
    qlab.BatchNormFolding().apply(sim)
    snapshot = qlab.Snapshot(sim)
    folded = {name: sim[name].weight.weight.detach().clone() for name in ("embed", "back")}
    assert torch.equal(folded["embed"], model.embed.weight)
    assert not torch.equal(folded["back"], model.back.weight)
    with torch.no_grad():
        sim["embed"].weight.weight.mul_(2)
        sim["back"].weight.weight.mul_(2)
    snapshot.restore()
    for name, weight in folded.items():
        assert torch.equal(sim[name].weight.weight, weight)
    assert torch.equal(lazy.embed.weight, model.embed.weight)
    assert path.read_bytes() == before
    with torch.no_grad():
        lazy.back.weight.add_(1)
    assert torch.equal(duplicate(lazy.back.weight), model.back.weight + 1)
    assert torch.equal(qlab.QuantSim(lazy, torch.randn(4, 6))["back"].weight.weight, model.back.weight + 1)


def test_a_file_that_does_not_fit_is_refused_before_anything_changes(saved, tmp_path):
    model, path = saved
    state = dict(model.state_dict())
    for name, wrong, told in (
        ("lacks", {k: v for k, v in state.items() if k != "back.bias"}, r"lacks 1 tensors .*'back\.bias'"),
        ("shape", {**state, "back.bias": torch.zeros(7)}, r"'back\.bias' is torch\.float32 \[6\].* \[7\]"),
    ):
        write_tensors(tmp_path / name, wrong, {})
        lazy = mapped(path)
        with pytest.raises(InputError, match=told):
            qlab.map_weights(lazy, tmp_path / name)
        assert torch.equal(lazy.back.bias, model.back.bias)
    for number, broken in enumerate((b"", b"\xff" * 40, path.read_bytes()[:-4])):
        (tmp_path / str(number)).write_bytes(broken)
        with pytest.raises(InputError, match="is not a readable safetensors file"):
            qlab.map_weights(mapped(path), tmp_path / str(number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8, torch.bool])
def test_a_tensor_in_a_file_has_its_values(dtype):
    tensor = torch.arange(-6, 6).view(3, 4).to(dtype)
    assert torch.equal(in_file(tensor.t()), tensor.t())
    assert in_file(tensor.t()).dtype == dtype
