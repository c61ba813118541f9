"""Exporting: all files or none, readable by others without qlab, refused with a sentence where it cannot be."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qlab
from qlab.errors import InputError, NotCalibrated
from qlab.export import export as export_module


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(1, 4, 3), nn.Linear(16, 16), nn.Linear(16, 3)
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.fc.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        return self.out(self.tied(self.fc(self.conv(x).relu().flatten(1))))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model, x = Small(), torch.randn(8, 1, 4, 4)
    sim = qlab.QuantSim(model, x, qlab.presets.w4a8(per_channel=True))
    sim.calibrate([x])
    return sim, model, x


@pytest.fixture(scope="module")
def files(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    exported = small[0].export(folder / "m", formats=["onnx", "encodings", "safetensors", "program"])
    return folder, exported


def test_what_is_written_is_what_is_reported(files):
    folder, exported = files
    names = ["m.encodings", "m.float.onnx", "m.onnx", "m.pt2", "m.safetensors"]
    assert sorted(os.listdir(folder)) == names
    assert exported.files == {folder / name: (folder / name).stat().st_size for name in names}
    assert all(name in repr(exported) for name in names)


ALONE = """
import sys
for name in ("torch", "qlab", "onnx", "onnxscript", "safetensors"):
    sys.modules[name] = None  # importing it now fails
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: numpy.load(sys.argv[2])})[0])
"""


def test_a_fresh_process_with_onnxruntime_and_numpy_alone_runs_the_file(small, files, tmp_path):
    sim, _, x = small
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = [files[0] / "m.onnx", tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], check=True, timeout=240)
    theirs = torch.from_numpy(np.load(tmp_path / "y.npy"))
    steps = (sim.output(x) - theirs).abs() / sim["out"].output.encoding.scale
    assert (steps < 0.5).float().mean() > 0.9
    assert steps.max() < 1.5


def test_the_weights_load_into_the_users_model_under_its_own_names(small, files):
    sim, model, x = small
    state = load_file(files[0] / "m.safetensors")
    assert state.keys() == model.state_dict().keys()
    fresh = Small()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), sim.float_output(x))
    assert torch.equal(state["tied.weight"], state["fc.weight"])


def test_updated_weights_lie_on_the_grid_that_a_technique_chose(small, tmp_path):
    sim, _, _ = small
    weight = sim["out"].weight
    codes = qlab.quantization.quantize(weight.weight.detach(), weight.encoding)
    before = weight.state()
    moved = codes + torch.where(codes < 7, 1, -1)
    weight.set_rounding(moved)
    sim.export(tmp_path / "m", formats=["safetensors"])
    weight.set_state(before)
    stored = load_file(tmp_path / "m.safetensors")["out.weight"]
    torch.testing.assert_close(stored / weight.encoding.scale[:, None], moved.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("where", ["_write_weights", "_move"])
def test_an_error_half_way_leaves_the_old_files_and_no_new_ones(small, tmp_path, monkeypatch, where):
    sim, _, _ = small
    (tmp_path / "m.encodings").write_text("old")
    (tmp_path / "other").write_text("not ours")

    def fail(*_):
        raise OSError("the disk is full")

    if where == "_write_weights":
        monkeypatch.setattr(export_module, where, fail)
    else:
        (tmp_path / "m.safetensors").mkdir()  # a folder where the second file should go
        (tmp_path / "m.safetensors" / "in the way").write_text("")
        monkeypatch.setattr(export_module.os, "replace", failing_at(2))
    with pytest.raises(OSError, match="disk is full"):
        sim.export(tmp_path / "m", formats=["encodings", "safetensors"])
    monkeypatch.undo()
    assert (tmp_path / "m.encodings").read_text() == "old"
    left = {"m.encodings", "other"} | ({"m.safetensors"} if where == "_move" else set())
    assert set(os.listdir(tmp_path)) == left


def failing_at(call):
    """os.replace that fails the n-th time it is called, from 0, and works otherwise."""
    replace, calls = os.replace, iter(range(10**6))

    def counted(source, target):
        if next(calls) == call:
            raise OSError("the disk is full")
        replace(source, target)

    return counted


def test_a_cancelled_export_leaves_nothing(small, tmp_path):
    class Cancelling:
        def step(self, done, total, text=""):
            if done:
                raise qlab.errors.Cancelled("enough")

    with pytest.raises(qlab.errors.Cancelled):
        small[0].export(tmp_path / "m", formats=["encodings", "safetensors"], progress=Cancelling())
    assert not os.listdir(tmp_path)


def test_an_export_over_an_earlier_one_replaces_it(small, tmp_path):
    sim, _, _ = small
    for version in ("1.0.0", "2.0.0"):
        sim.export(tmp_path / "m", encodings=version, formats=["encodings"])
    assert '"2.0.0"' in (tmp_path / "m.encodings").read_text()
    assert os.listdir(tmp_path) == ["m.encodings"]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"formats": ["tflite"]}, "formats must be some of 'onnx'"),
        ({"formats": "onnx"}, "formats must be some of"),
        ({"formats": []}, "formats must be some of"),
        ({"weights": "int8"}, "weights must be 'float' or 'integer'"),
        ({"encodings": "3", "formats": ["encodings"]}, "encodings must be one of '0.6.1'"),
    ],
)
def test_an_unknown_wish_is_refused_with_a_sentence(small, tmp_path, asked, sentence):
    with pytest.raises(InputError, match=sentence):
        small[0].export(tmp_path / "m", **asked)
    assert not os.listdir(tmp_path)


def test_a_sim_without_encodings_is_refused(tmp_path):
    sim = qlab.QuantSim(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    with pytest.raises(NotCalibrated, match=r"sim\.calibrate"):
        sim.export(tmp_path / "m")
    assert not os.listdir(tmp_path)
