"""History: every step can be returned to, exactly, and what cannot is said."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

import qlab
from qlab.errors import HistoryError
from tests.lab.conftest import differing, state_of

THOUSAND_EDITS = """
import gc, json
import psutil, torch, qlab
from tests.lab.conftest import Network

torch.manual_seed(0)
torch.set_num_threads(1)
batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
sim = qlab.QuantSim(Network().eval(), batches[0], qlab.presets.w8a8())
sim.calibrate(batches)
lab = qlab.Lab(sim, batches, score=qlab.Accuracy([(batch, torch.arange(8) % 4) for batch in batches]))
calls = []
lab.events.edited.connect(lambda names: calls.append(1))

def edits(count):
    for number in range(count):
        name = "fc" if number % 2 else "stem"
        lab.set(name, "weight", bits=2 + number % 7)
        lab.select(name)

def counted(when):
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.numel() > 1000]
    return {
        f"memory{when}": psutil.Process().memory_info().rss,
        f"listeners{when}": sum(len(getattr(lab.events, name)) for name in lab.events.guards),
        f"large{when}": len(tensors),
    }

edits(50)
before = counted("")
edits(1000)
print(json.dumps({**before, **counted("_after"), "steps": lab.step, "calls": len(calls)}))
"""


def test_every_step_can_be_returned_to_bit_for_bit(lab: qlab.Lab, batches: list[Tensor], nudge) -> None:
    def shown() -> tuple:
        return state_of(lab.sim), lab.sim.output(batches[0]), lab.layers().drop(columns="noise"), lab.size()

    states = [shown()]
    for act in (
        lambda: lab.set("fc", "weight", bits=4),
        lambda: lab.set_range("fc", "output", -1, 1),
        lambda: lab.run(nudge(steps=2)),
        lambda: lab.configure("*", weight={"granularity": "per_channel"}),
        lambda: lab.calibrate(batches[:1]),
        lambda: lab.run(qlab.BatchNormFolding()),
        lambda: lab.set("stem", "weight", bits=3),
        lambda: lab.run(nudge(steps=1)),
    ):
        act()
        states.append(shown())
    for step in [*reversed(range(len(states))), *range(len(states)), 3, 7, 0, 8, 5]:
        lab.go_to(step)
        state, output, layers, size = states[step]
        assert differing(state, state_of(lab.sim)) == [], step
        assert torch.equal(lab.sim.output(batches[0]), output)
        assert lab.layers().drop(columns="noise").equals(layers)
        assert lab.size() == size


def test_a_new_action_drops_the_undone_ones(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=4)
    lab.set("fc", "weight", bits=3)
    lab.undo()
    assert lab.can_redo
    lab.set("fc", "weight", bits=2)
    assert not lab.can_redo
    assert list(lab.history["action"]) == ["start", "fc weight bits 4", "fc weight bits 2"]
    with pytest.raises(HistoryError, match="nothing to redo"):
        lab.redo()


def test_nothing_to_undo_is_said(lab: qlab.Lab) -> None:
    assert not lab.can_undo
    with pytest.raises(HistoryError, match="nothing to undo"):
        lab.undo()
    with pytest.raises(HistoryError, match="there is no step 7"):
        lab.go_to(7)
    with pytest.raises(HistoryError, match="there is no step -1"):
        lab.go_to(-1)


def test_several_layers_are_one_step(lab: qlab.Lab) -> None:
    lab.set(["stem", "fc"], "weight", bits=4)
    lab.set("*", "weight", bits=3)
    assert lab.step == 2
    lab.undo()
    assert [lab.sim[name].weight.bits for name in ("stem", "body", "fc")] == [4, 8, 4]


def test_a_change_made_in_a_cell_can_be_undone(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=6)
    lab.sim["fc"].weight.bits = 4
    lab.undo()
    assert lab.sim["fc"].weight.bits == 6
    assert list(lab.history["action"]) == ["start", "fc weight bits 6", "fc weight bits 4"]


def test_assigning_the_same_value_in_a_cell_is_no_step(lab: qlab.Lab) -> None:
    lab.sim["fc"].weight.bits = 4
    lab.sim["fc"].weight.bits = 8
    lab.refresh()
    assert lab.step == 0


def test_a_technique_applied_in_a_cell_is_a_step_that_can_be_undone(lab: qlab.Lab, batches, nudge) -> None:
    before = state_of(lab.sim)
    lab.sim["fc"].weight.bits = 4
    nudge(steps=1).apply(lab.sim, batches)
    lab.sim["stem"].weight.bits = 5
    lab.refresh()
    assert list(lab.history["verb"]) == ["start", "run"]
    script = lab.script()
    assert script.index("bits=4") < script.index("_Nudge(steps=1).apply(sim, batches)") < script.index("bits=5")
    lab.undo()
    assert differing(before, state_of(lab.sim)) == []


def test_weights_changed_in_a_cell_are_a_step_that_can_be_undone_but_not_written(lab: qlab.Lab) -> None:
    before = state_of(lab.sim)
    with torch.no_grad():
        lab.sim.model.fc.weight.mul_(2)
    assert "weights were changed in a cell" in lab.script()
    assert lab.step == 1
    lab.undo()
    assert differing(before, state_of(lab.sim)) == []
    assert "weights were changed" not in lab.script()


def test_scores_and_size_stand_beside_each_step_and_come_back_with_it(lab: qlab.Lab) -> None:
    first = lab.scores
    lab.set("*", "weight", bits=2)
    assert lab.history["sqnr"].isna().tolist() == [False, True]
    second = lab.scores
    history = lab.history
    assert history["sqnr"].tolist() == [float(first["sqnr"].quantized), float(second["sqnr"].quantized)]
    assert history["size_bytes"].iloc[1] < history["size_bytes"].iloc[0]
    lab.undo()
    assert not lab.scores_are_stale
    assert lab.known_scores["score"].quantized == first["score"].quantized
    assert history["is_current"].tolist() == [False, True]
    assert lab.history["is_undone"].tolist() == [False, True]


def test_weights_beyond_the_budget_are_dropped_oldest_first_and_it_is_said(sim: qlab.QuantSim, batches, nudge) -> None:
    one = sum(t.numel() * t.element_size() for t in (*sim.model.parameters(), *sim.model.buffers()))
    lab = qlab.Lab(sim, batches, max_history_bytes=2 * one)
    for _ in range(3):
        lab.run(nudge(steps=1))
    assert lab.history["is_reachable"].tolist() == [False, False, True, True]
    lab.undo()
    assert not lab.can_undo
    with pytest.raises(HistoryError, match=r"step 1 .* cannot be returned to: its weights were dropped"):
        lab.undo()
    lab.redo()
    assert lab.step == 3


def test_comparing_two_steps_names_each_difference(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=4)
    lab.set("relu", "output", enabled=False)
    frame = lab.compare(0, 1)
    assert list(frame["layer"]) == ["fc", "fc"]
    assert list(frame["setting"]) == ["weight_bits", "weight_sqnr"]
    assert (frame["before"].iloc[0], frame["after"].iloc[0]) == (8, 4)
    assert set(lab.compare(1, 2)["layer"]) == {"stem", "norm", "relu"}
    assert lab.compare(2, 2).empty
    assert lab.compare(1, 0)["after"].iloc[0] == 8


def test_a_thousand_edits_leave_memory_and_listeners_as_they_were() -> None:
    """In a process of its own: the tensors and the memory of other tests would be counted as well."""
    ended = subprocess.run([sys.executable, "-c", THOUSAND_EDITS], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert (found["steps"], found["calls"]) == (1050, 1050)
    assert found["memory_after"] < 1.1 * found["memory"]
    assert found["listeners_after"] == found["listeners"]
    assert found["large_after"] == found["large"] > 0  # statistics are shared between steps


def test_statistics_are_shared_between_steps_that_did_not_change_them(lab: qlab.Lab) -> None:
    def large() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if _is_tensor(o) and o.numel() >= 2048]

    lab.set("fc", "output", bits=4)
    before = large()  # kept: another test's tensor that goes meanwhile must not make room for one of ours
    for bits in (5, 6, 7, 4, 3, 9):
        lab.set("fc", "output", bits=bits)
    known = {id(tensor) for tensor in before}
    assert not [tensor.shape for tensor in large() if id(tensor) not in known]


def _is_tensor(value: object) -> bool:
    """Whether an object of the whole process is a tensor with a size; those of lazy modules have none yet."""
    return issubclass(type(value), Tensor) and not is_lazy(value)
