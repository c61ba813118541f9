"""The panel writes what `sim.export` writes, says so, and shows why where it cannot."""

import onnx
import pytest
import torch
from torch import nn

import qlab
from qlab.views import Export


@pytest.fixture
def lab():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(16, 6)]
    return qlab.Lab(qlab.QuantSim(model, batches[0], qlab.presets.w8a8()), batches)


def test_it_writes_the_encodings_of_the_version_chosen(lab, tmp_path):
    view = Export(lab, str(tmp_path / "panel"))
    view._formats["onnx"].value = view._formats["safetensors"].value = False
    view._encodings.value = "0.6.1"
    view.export().result()
    lab.sim.export(tmp_path / "direct", "0.6.1", formats=["encodings"])
    assert (tmp_path / "panel.encodings").read_text() == (tmp_path / "direct.encodings").read_text()
    assert str(tmp_path / "panel.encodings") in view._files.value
    lab.set("0", "weight", bits=4)
    assert "changed since" in view._said.value
    view.close()


def test_integer_weights_are_written_where_asked_for(lab, tmp_path):
    view = Export(lab, str(tmp_path / "panel"))
    view._formats["encodings"].value = view._formats["safetensors"].value = False
    view._integers.value = True
    view.export().result()
    types = {i.name: i.data_type for i in onnx.load(tmp_path / "panel.onnx").graph.initializer}
    assert types["0.weight_q"] == onnx.TensorProto.INT8
    assert "0.weight" not in types
    view.close()


def test_the_check_on_target_and_the_comparison_show_what_the_functions_say(lab, tmp_path):
    view = Export(lab, str(tmp_path / "panel"))
    view.export().result()
    view._layers.value = True
    view.check().result()
    direct = qlab.on_target(lab.sim, tmp_path / "panel.onnx", lab.batches)
    assert view.checked.identical == direct.identical
    assert view.checked.layers is not None
    assert f"{direct.identical:.2%} of the integers" in view._target.value
    lab.set("0", "weight", bits=4)
    view._other.value = str(tmp_path / "panel.onnx")
    view.compare().result()
    assert list(view.compared.loc[view.compared["state"] == "differs", "tensor"]) == ["0 (weight)"]
    assert "1 are not" in view._compared.value
    assert view._target.value in view.to_html()
    view.close()


def test_what_cannot_be_checked_is_said(lab, tmp_path):
    view = Export(lab, str(tmp_path / "panel"))
    with pytest.raises(qlab.errors.InputError, match="there is no file"):
        view.check().result()
    assert view.frame.error is not None
    with pytest.raises(ValueError, match="needs the path"):
        view.compare()
    view.close()


def test_what_went_wrong_is_shown(lab, tmp_path):
    (tmp_path / "file").write_text("")
    view = Export(lab, str(tmp_path / "file" / "model"))
    with pytest.raises(OSError, match="file"):
        view.export().result()
    assert view.frame.error is not None
    assert view.exported is None
    view.close()
