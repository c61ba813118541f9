"""The script of a lab reproduces its state: every scale, zero point, weight and score, for whatever was done."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import qlab
import qlab.sim.quant_sim
from qlab.errors import HistoryError, SpecError
from qlab.graph import LayerGraph
from qlab.techniques import TECHNIQUES
from tests.lab.conftest import _Nudge, differing, state_of

LAYERS = ["x", "stem", "relu", "body", "relu_1", "mean", "fc"]
WEIGHTS = ["stem", "body", "fc"]


@pytest.fixture(scope="session")
def graph(network: nn.Module, batches: list[Tensor]) -> LayerGraph:
    return qlab.capture(network, batches[0])


@pytest.fixture
def quick_capture(graph: LayerGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing again gives an equal graph; here a copy of one saves a second a script."""
    monkeypatch.setattr(qlab.sim.quant_sim, "captured", lambda *_: copy.deepcopy(graph))


class World:
    """What a script finds in a fresh kernel."""

    def __init__(self, sim: qlab.QuantSim, model: nn.Module, batches: list[Tensor], labelled: list[Any]) -> None:
        self.sim, self.model, self.batches, self.labelled = sim, model, batches, labelled
        self.score = qlab.Accuracy(labelled)

    def run(self, script: str) -> qlab.QuantSim:
        names = {"model": self.model, "example": self.batches[0], "batches": self.batches, "score": self.score}
        names["labelled"] = self.labelled
        exec(compile(script, "script", "exec"), names)
        return names["sim"]


@pytest.fixture
def world(captured: qlab.QuantSim, network: nn.Module, batches, labelled, quick_capture: None) -> World:
    return World(captured, network, batches, labelled)


part_and_layer = st.one_of(
    st.tuples(st.just("weight"), st.sampled_from(WEIGHTS)), st.tuples(st.just("output"), st.sampled_from(LAYERS))
)
one_setting = st.one_of(
    st.fixed_dictionaries({"bits": st.integers(2, 16)}),
    st.fixed_dictionaries({"scheme": st.sampled_from(["symmetric", "asymmetric", "strict_symmetric"])}),
    st.fixed_dictionaries({"rule": st.sampled_from(["min_max", "mse", "percentile(99.1234567)", "entropy"])}),
    st.fixed_dictionaries({"enabled": st.booleans()}),
    st.fixed_dictionaries({"frozen": st.booleans()}),
    st.fixed_dictionaries({"bits": st.integers(2, 8), "frozen": st.booleans()}),
)
granularity = st.sampled_from(["per_tensor", "per_channel", "per_block(2)"])
bound = st.floats(0.125, 8, allow_nan=False, width=32)

techniques = st.sampled_from(
    [_Nudge(steps=1), qlab.BatchNormFolding(), qlab.CrossLayerEqualization(), qlab.BiasCorrection()]
)
action = st.one_of(
    st.tuples(st.just("set"), part_and_layer, one_setting),
    st.tuples(st.just("granularity"), st.sampled_from(WEIGHTS), granularity),
    st.tuples(st.just("configure"), st.sampled_from(["*", "r*", "[bf]*"]), one_setting),
    st.tuples(st.just("set_range"), part_and_layer, bound, bound),
    st.tuples(st.just("cell"), part_and_layer, one_setting),
    st.tuples(st.just("cell_freeze"), part_and_layer, bound),
    st.tuples(st.just("run"), techniques),
    st.tuples(st.just("cell_run"), techniques),
    st.tuples(st.just("cell_calibrate")),
    st.tuples(st.just("calibrate")),
    st.tuples(st.sampled_from(["undo", "undo", "redo"])),
    st.tuples(st.just("go_to"), st.integers(0, 12)),
)


def perform(lab: qlab.Lab, verb: str, *arguments: Any) -> None:
    if verb == "set":
        (part, layer), asked = arguments
        lab.set(layer, part, **asked)
    elif verb == "granularity":
        lab.set(arguments[0], "weight", granularity=arguments[1])
    elif verb == "configure":
        lab.configure(arguments[0], weight=arguments[1], output={k: v for k, v in arguments[1].items() if k != "rule"})
    elif verb == "set_range":
        (part, layer), low, high = arguments
        lab.set_range(layer, part, -low, high)
    elif verb == "cell":
        (part, layer), asked = arguments
        for key, value in asked.items():
            setattr(getattr(lab.sim[layer], part), key, value)
        lab.refresh()
    elif verb == "cell_freeze":
        (part, layer), high = arguments
        getattr(lab.sim[layer], part).set_range(-1.0, high)
        lab.refresh()
    elif verb == "cell_run":
        arguments[0].apply(lab.sim, lab.batches)
    elif verb == "cell_calibrate":
        lab.sim.calibrate(lab.batches)
    else:
        getattr(lab, verb)(*arguments)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=st.lists(action, min_size=1, max_size=12))
def test_the_script_of_any_sequence_of_actions_reproduces_the_state(world: World, actions: list[Any]) -> None:
    lab = qlab.Lab(copy.deepcopy(world.sim), world.batches, score=world.score)
    for each in actions:
        try:
            perform(lab, *each)
        except (SpecError, HistoryError):
            lab.refresh()
    sim = world.run(lab.script())
    assert differing(state_of(lab.sim), state_of(sim)) == []
    assert sim.evaluate(world.score) == lab.sim.evaluate(world.score)
    assert torch.equal(sim.output(world.batches[0]), lab.sim.output(world.batches[0]))


def test_undone_steps_are_not_in_the_script(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=4)
    lab.set("stem", "weight", bits=3)
    lab.undo()
    assert "bits=4" in lab.script()
    assert "bits=3" not in lab.script()


def test_the_script_reads_as_a_person_would_write_it(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=4, granularity="per_channel")
    lab.set("r*", "output", rule="percentile(99.9)")
    lab.set(["stem", "body"], "weight", bits=6)
    lab.set_range("fc", "output", -1, 2.5)
    assert lab.script() == (
        "import qlab\n\n"
        "sim = qlab.QuantSim(model, example, qlab.presets.w8a8())\n"
        "sim.calibrate(batches)\n"
        "sim['fc'].weight.set(bits=4, granularity='per_channel')\n"
        "sim.configure('r*', output={'rule': 'percentile(99.9)'})\n"
        "for name in ['stem', 'body']:\n"
        "    sim[name].weight.set(bits=6)\n"
        "sim['fc'].output.set_range(-1.0, 2.5)\n"
    )


def test_changes_made_in_a_cell_are_in_the_script(lab: qlab.Lab) -> None:
    lab.sim["fc"].weight.bits = 4
    lab.sim["relu"].output.enabled = False
    assert "sim['fc'].weight.set(bits=4)" in lab.script()
    assert "sim['relu'].output.set(enabled=False)" in lab.script()
    assert list(lab.history["action"]) == ["start", "2 changes in a cell"]


def test_ranges_of_single_channels_are_written_exactly(lab: qlab.Lab, world: World) -> None:
    lab.set("stem", "weight", granularity="per_channel")
    lab.set_range("stem", "weight", [-0.1] * 6, torch.linspace(0.1, 1 / 3, 6))
    sim = world.run(lab.script())
    assert differing(state_of(lab.sim), state_of(sim)) == []


def test_a_grid_assigned_in_a_cell_is_written_as_it_is(lab: qlab.Lab, world: World) -> None:
    lab.sim["fc"].output.encoding = qlab.Encoding(torch.tensor(0.1), torch.tensor(3.0), 0, 15)
    assert "qlab.Encoding(" in lab.script()
    sim = world.run(lab.script())
    assert differing(state_of(lab.sim), state_of(sim)) == []


def test_what_cannot_be_written_is_said_and_stops_the_script(lab: qlab.Lab, world: World) -> None:
    lab.run(_Nudge(at_step=lambda step: None))
    script = lab.script()
    assert "# at_step of _Nudge: function has no Python text" in script
    with pytest.raises(NotImplementedError, match="put the step here"):
        world.run(script)


def test_data_without_a_name_is_said_and_stops_the_script(lab: qlab.Lab, batches: list[Tensor]) -> None:
    lab.calibrate(batches[:1])
    assert "raise NotImplementedError" in lab.script()
    assert "sim.calibrate(...)" in lab.script()


def test_data_that_the_notebook_has_a_name_for_is_called_so(lab: qlab.Lab, batches, monkeypatch) -> None:
    first = batches[:1]
    monkeypatch.setattr(sys.modules["__main__"], "first_batch", first, raising=False)
    lab.calibrate(first)
    assert lab.script().endswith("sim.calibrate(first_batch)\n")


QUICK = {"iterations": 3, "epochs": 1, "batches": 1, "verify": 0, "finalists": 1}


@pytest.mark.parametrize("name", [n for n, t in TECHNIQUES.items() if t.__module__.startswith("qlab.")])
def test_the_script_reproduces_what_each_technique_did(
    name: str, sim: qlab.QuantSim, world: World, labelled: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = TECHNIQUES[name]
    settings = {key: value for key, value in QUICK.items() if key in kind.__dataclass_fields__}
    if name == "AutoQuant":
        settings["techniques"] = ("CrossLayerEqualization",)
    monkeypatch.setattr(sys.modules["__main__"], "labelled", labelled, raising=False)
    lab = qlab.Lab(sim, world.batches, score=world.score)
    before = state_of(lab.sim)
    lab.set("stem", "weight", bits=4)
    lab.run(kind(**settings), batches=labelled if kind.needs_labels else None)
    lab.set("fc", "output", bits=6)
    after = state_of(lab.sim)
    assert differing(after, state_of(world.run(lab.script()))) == []
    lab.go_to(0)
    assert differing(before, state_of(lab.sim)) == []
    lab.go_to(3)
    assert differing(after, state_of(lab.sim)) == []


@pytest.mark.parametrize(
    ("preset", "code"),
    [
        (qlab.presets.w8a8(), "qlab.presets.w8a8()"),
        (qlab.presets.w4a8(per_channel=True, skip=["fc"]), "qlab.presets.w4a8(per_channel=True, skip=('fc',))"),
        (qlab.presets.w4a4(symmetric=True), "qlab.presets.w4a4(symmetric=True)"),
        (qlab.presets.w4a4(rule="min_max", int32_bias=True), "qlab.presets.w4a4(rule='min_max', int32_bias=True)"),
    ],
)
def test_presets_are_written_as_the_call_that_makes_them(preset: qlab.Preset, code: str, world: World) -> None:
    lab = qlab.Lab(qlab.QuantSim(world.model, world.batches[0], preset), world.batches)
    assert f"qlab.QuantSim(model, example, {code})" in lab.script()


def test_a_preset_of_ones_own_is_spelled_out(world: World) -> None:
    preset = qlab.Preset(
        "mine",
        weight=qlab.QuantSpec(5, "symmetric", "per_channel"),
        output=qlab.QuantSpec(7, rule="percentile(99.99925)"),
        kinds=(("linear", "weight", qlab.QuantSpec(8)), ("mean", "output", None)),
    )
    lab = qlab.Lab(qlab.QuantSim(world.model, world.batches[0], preset), world.batches)
    sim = world.run(lab.script())
    assert sim.preset == preset
    assert differing(state_of(lab.sim), state_of(sim)) == []


def test_settings_made_before_the_lab_are_in_the_script(sim: qlab.QuantSim, world: World) -> None:
    sim["fc"].weight.bits = 4
    sim.configure("relu*", output={"bits": 6})
    lab = qlab.Lab(sim, world.batches)
    again = world.run(lab.script())
    assert differing(state_of(lab.sim), state_of(again)) == []


PROCESS = """
import sys
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
import qlab
data = qlab.examples.digits()
model, example, batches = qlab.examples.mobilenet(), data.test[0], data.calibration(2)
score = qlab.Accuracy(data.test[:2])
exec(open(sys.argv[1]).read())
found = {f"model.{k}": v.contiguous() for k, v in sim.model.state_dict().items()}
for name, quantizer in sim.quantizers.items():
    found[f"{name}.scale"] = quantizer.encoding.scale.clone()
    found[f"{name}.zero_point"] = quantizer.encoding.zero_point.clone()
found["score"] = torch.tensor(float(sim.evaluate(score)))
found["output"] = sim.output(data.test[0])
save_file(found, sys.argv[2])
"""


def test_the_script_reproduces_the_state_in_a_fresh_process(tmp_path: Path) -> None:
    data = qlab.examples.digits()
    sim = qlab.QuantSim(qlab.examples.mobilenet(), data.test[0], qlab.presets.w8a8(per_channel=True))
    score = qlab.Accuracy(data.test[:2])
    lab = qlab.Lab(sim, data.calibration(2), score=score)
    lab.set("blocks.*", "weight", bits=5)
    lab.set_range("head.relu", "output", 0, 3.3)
    lab.set("classifier", "weight", bits=2)
    lab.undo()
    lab.run(qlab.BatchNormFolding())
    lab.run(qlab.CrossLayerEqualization(absorb_bias=False))
    lab.undo()
    lab.run(qlab.CrossLayerEqualization())
    qlab.BiasCorrection().apply(sim, data.calibration(2))  # as a cell would, with data that has no name here
    lab.undo()
    lab.run(qlab.BiasCorrection())
    lab.sim["classifier"].weight.rule = "mse"
    script, found = tmp_path / "script.py", tmp_path / "found.safetensors"
    script.write_text(lab.script())
    subprocess.run([sys.executable, "-c", PROCESS, str(script), str(found)], check=True, timeout=240)
    other = load_file(found)
    for name, value in lab.sim.model.state_dict().items():
        assert torch.equal(value, other[f"model.{name}"]), name
    for name, quantizer in lab.sim.quantizers.items():
        assert torch.equal(quantizer.encoding.scale, other[f"{name}.scale"]), name
        assert torch.equal(quantizer.encoding.zero_point, other[f"{name}.zero_point"]), name
    assert float(lab.sim.evaluate(score)) == pytest.approx(float(other["score"]), abs=1e-7)
    assert torch.equal(lab.sim.output(data.test[0]), other["output"])
