"""The lab's verbs: what they change, what they refuse, and what they show."""

import copy
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import Busy, InputError, SpecError, UnknownLayer
from qlab.techniques import Technique
from tests.lab.conftest import differing, state_of


def test_set_takes_a_name_a_glob_or_several_names(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=4)
    lab.set("relu*", "output", bits=5)
    lab.set(("stem", "body"), "weight", bits=6, granularity="per_channel")
    assert [lab.sim[name].weight.bits for name in ("stem", "body", "fc")] == [6, 6, 4]
    assert [lab.sim[name].output.bits for name in ("relu", "relu_1", "fc")] == [5, 5, 8]


def test_a_setting_of_a_fused_layer_goes_to_the_quantizer_of_its_group(lab: qlab.Lab) -> None:
    lab.set("stem", "output", bits=4)
    assert lab.sim["relu"].output.bits == 4
    assert lab.layer_row("norm").output_bits == 4


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (lambda lab: lab.set("fcc", "weight", bits=4), UnknownLayer, "Did you mean 'fc'"),
        (lambda lab: lab.set(["fc", "nothing"], "weight", bits=4), UnknownLayer, "nothing"),
        (lambda lab: lab.set("relu", "weight", bits=4), SpecError, "'relu' has no weight"),
        (lambda lab: lab.set("fc", "weights", bits=4), SpecError, "part must be 'weight' or 'output'"),
        (lambda lab: lab.set("fc", "weight", bits=1), SpecError, "bits must be a whole number from 2 to 16"),
        (lambda lab: lab.set("fc", "weight", bit=4), SpecError, "not settings of a quantizer"),
        (lambda lab: lab.set("*", "output", granularity="per_block(4)"), SpecError, "cannot be quantized per block"),
        (lambda lab: lab.set(["stem", "fc"], "output", bits=4, rule="mean"), SpecError, "rule must be one of"),
        (lambda lab: lab.configure("nothing*", weight={"bits": 4}), UnknownLayer, "matches no layer"),
        (lambda lab: lab.start(7), InputError, "expected a technique, an analysis or a function"),
        (lambda lab: lab.select("nothing*"), UnknownLayer, "matches no layer"),
        (lambda lab: lab.layer_row("nothing"), UnknownLayer, "has no layer"),
        (lambda lab: lab.histogram("relu", "weight"), SpecError, "has no weight"),
    ],
)
def test_what_is_refused_says_why_and_changes_nothing(lab: qlab.Lab, act, error, says: str) -> None:
    lab.set("fc", "weight", bits=6)
    lab.set_range("relu", "output", 0, 2)
    before, step = state_of(lab.sim), lab.step
    with pytest.raises(error, match=says):
        act(lab)
    assert differing(before, state_of(lab.sim)) == []
    assert lab.step == step
    lab.refresh()
    assert lab.step == step


def test_a_range_holds_until_a_setting_is_changed(lab: qlab.Lab, batches: list[Tensor]) -> None:
    lab.set_range("fc", "output", -1, 3)
    encoding = lab.sim["fc"].output.encoding
    assert (float(encoding.minimum), float(encoding.maximum)) == pytest.approx((-1, 3), abs=float(encoding.scale))
    assert lab.sim["fc"].output.frozen
    lab.calibrate()
    assert lab.sim["fc"].output.encoding.equals(encoding)
    lab.set("fc", "output", bits=8, frozen=False)
    lab.calibrate()
    assert not lab.sim["fc"].output.encoding.equals(encoding)


def test_a_lab_calibrates_a_sim_that_was_not(network: nn.Module, batches: list[Tensor], captured) -> None:
    sim = qlab.QuantSim(network, batches[0])
    lab = qlab.Lab(sim, batches)
    assert differing(state_of(sim), state_of(captured)) == []
    assert "sim.calibrate(batches)" in lab.script()


def test_a_generator_will_do_as_data(sim: qlab.QuantSim, batches: list[Tensor]) -> None:
    lab = qlab.Lab(sim, (batch for batch in batches))
    lab.calibrate()
    assert lab.scores["sqnr"].quantized.samples == 16


def test_no_data_is_refused(sim: qlab.QuantSim) -> None:
    with pytest.raises(InputError, match="at least one batch"):
        qlab.Lab(sim, [])


def test_run_gives_the_report_and_undo_takes_it_back(lab: qlab.Lab, batches: list[Tensor]) -> None:
    before = state_of(lab.sim)
    report = lab.run(qlab.BatchNormFolding())
    assert report.technique == "BatchNormFolding"
    assert lab.layer_row("norm").kind == "identity"
    lab.undo()
    assert lab.layer_row("norm").kind == "batch_norm"
    assert differing(before, state_of(lab.sim)) == []
    lab.redo()
    assert lab.sim.graph.edits == [("norm", "identity")]


def test_layers_show_settings_and_losses(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=4, granularity="per_channel", rule="mse")
    lab.set("mean", "output", enabled=False)
    frame = lab.layers().set_index("name")
    assert list(frame.index) == ["x", "stem", "norm", "relu", "body", "add", "relu_1", "mean", "fc"]
    fc = frame.loc["fc"]
    assert (fc.weight_bits, fc.weight_granularity, fc.weight_rule, fc.parameters) == (4, "per_channel", "mse", 28)
    assert (frame.loc["stem", "role"], frame.loc["stem", "grid"]) == ("fused", "relu")
    assert frame.loc["mean", "output_sqnr"] == float("inf")
    assert frame.loc["relu", "output_sqnr"] > 40
    weight = lab.sim["fc"].weight
    exact, rounded = weight.weight.detach().double(), weight.quantized().detach().double()
    ratio = exact.square().sum() / (exact - rounded).square().sum()
    assert fc.weight_sqnr == pytest.approx(10 * float(torch.log10(ratio)))


def test_size_counts_each_parameter_at_its_bits(lab: qlab.Lab) -> None:
    # stem 6x3x3x3 + 6, norm 6 + 6, body 6x1x3x3 + 6, fc 4x6 + 4
    floats = 6 + 6 + 6 + 6 + 4
    assert lab.size() == (162 + 54 + 24) + 4 * floats
    lab.set("stem", "weight", bits=4)
    assert lab.size() == (81 + 54 + 24) + 4 * floats
    lab.set("fc", "weight", enabled=False)
    assert lab.size() == (81 + 54 + 96) + 4 * floats


def test_its_repr_is_one_line_that_is_the_same_on_every_run(lab: qlab.Lab) -> None:
    assert repr(lab) == "Lab(w8a8, 9 layers, 352 bytes, step 0 of 0)"
    lab.set("fc", "weight", bits=4)
    lab.undo()
    assert repr(lab) == "Lab(w8a8, 9 layers, 352 bytes, step 0 of 1)"


def test_without_a_kernel_a_cell_shows_static_tables(lab: qlab.Lab) -> None:
    bundle = lab._repr_mimebundle_()
    assert bundle["text/plain"] == repr(lab)
    assert "<table>" in bundle["text/html"]
    assert "<td>fc</td>" in bundle["text/html"]


def test_names_are_escaped_where_they_are_shown(batches: list[Tensor], tmp_path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    model = nn.Sequential()
    model.add_module(hostile, nn.Conv2d(3, 2, 1))
    lab = qlab.Lab(qlab.QuantSim(model.eval(), batches[0]), batches)
    lab.set(hostile, "weight", bits=4)
    for text in (lab._repr_mimebundle_()["text/html"], lab.save_html(tmp_path / "page.html").read_text()):
        assert hostile not in text
        assert "&lt;img src=x" in text


def test_the_page_for_a_colleague_holds_the_state_and_fetches_nothing(lab: qlab.Lab, tmp_path) -> None:
    lab.set("fc", "weight", bits=3)
    path = lab.save_html(tmp_path / "report.html")
    page = path.read_text()
    for text in ("Scores", "Noise by layer", "The tensors that lose most", "fc weight bits 3", "accuracy"):
        assert text in page
    assert "default-src 'none'" in page
    assert "<script src" not in page
    assert list(tmp_path.iterdir()) == [path]


def test_a_lab_works_where_no_widgets_and_no_bokeh_are_installed() -> None:
    code = """
import sys
for name in ("ipywidgets", "anywidget", "bokeh", "IPython"):
    sys.modules[name] = None
import torch, qlab
from torch import nn
x = torch.randn(4, 3)
lab = qlab.Lab(qlab.QuantSim(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x), [x])
lab.set("0", "weight", bits=4)
assert lab.scores["sqnr"].quantized > 0
lab._repr_mimebundle_(), lab.script(), lab.histogram("0"), lab.layers()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_program_ends_cleanly_while_a_job_runs() -> None:
    code = """
import time, torch, qlab
from torch import nn
x = torch.randn(4, 3)
lab = qlab.Lab(qlab.QuantSim(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x), [x])
def forever(sim, progress):
    for i in range(10**9):
        progress.step(i, 10**9)
        sim.output(x)
lab.start(forever)
time.sleep(0.3)
print("end")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.strip()) == (0, "end")
    assert "Traceback" not in ended.stderr


@dataclass(frozen=True)
class _Copying(Technique):  # as AutoQuant: the sim given stays, the result holds a new one
    def apply(self, sim, batches=None, score=None, progress=None, **_: object) -> "_Found":  # type: ignore[override]
        found = copy.deepcopy(sim)
        qlab.BatchNormFolding().apply(found, batches)
        found["fc"].weight.bits = 4
        return _Found(found)


@dataclass(frozen=True)
class _Found:
    sim: qlab.QuantSim


def test_a_lab_goes_on_with_the_sim_that_a_technique_found(lab: qlab.Lab, batches: list[Tensor]) -> None:
    before = state_of(lab.sim)
    result = lab.run(_Copying())
    assert result.sim is not lab.sim
    assert differing(state_of(result.sim), state_of(lab.sim)) == []
    assert torch.equal(result.sim.output(batches[0]), lab.sim.output(batches[0]))
    assert lab.script().endswith("sim = _Copying().apply(sim, batches, score=score).sim\n")
    lab.undo()
    assert differing(before, state_of(lab.sim)) == []
    lab.redo()
    assert differing(state_of(result.sim), state_of(lab.sim)) == []


def test_an_edit_that_changes_nothing_is_no_step(lab: qlab.Lab) -> None:
    lab.set("fc", "weight", bits=8)
    lab.configure("*", output={"enabled": True})
    assert lab.step == 0
    lab.set_range("fc", "output", -1, 1)
    lab.set_range("fc", "output", -1, 1)
    assert lab.step == 1


def test_the_script_is_kept_in_a_file_after_every_step(sim: qlab.QuantSim, batches: list[Tensor], tmp_path) -> None:
    path = tmp_path / "script.py"
    lab = qlab.Lab(sim, batches, script_path=path)
    assert path.read_text() == lab.script()
    lab.set("fc", "weight", bits=4)
    assert "bits=4" in path.read_text()
    lab.run(qlab.BatchNormFolding())
    assert path.read_text().endswith("qlab.BatchNormFolding().apply(sim, batches)\n")
    lab.go_to(0)
    assert path.read_text() == lab.script()
    assert list(tmp_path.iterdir()) == [path]


def test_two_labs_on_one_sim_know_of_each_other(lab: qlab.Lab, batches: list[Tensor], nudge) -> None:
    other = qlab.Lab(lab.sim, batches)
    lab.set("fc", "weight", bits=4)
    other.refresh()
    assert list(other.history["action"]) == ["start", "fc weight bits 4"]
    began = threading.Event()
    job = lab.start(nudge(steps=10**6, at_step=lambda step: (began.set(), time.sleep(0.001))))
    began.wait(5)
    with pytest.raises(Busy, match="_Nudge is changing the sim"):
        other.set("fc", "weight", bits=3)
    with pytest.raises(Busy):
        qlab.Lab(lab.sim, batches)
    job.cancel()
    with pytest.raises(qlab.errors.Cancelled):
        job.result(timeout_s=5)
