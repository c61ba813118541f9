"""Grids beside others': what ONNX Runtime's own quantizer or torchao wrote, an encodings file, another sim."""

import copy
import functools

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

import qlab
from qlab.errors import InputError
from tests.reference import RECORDED, recorded


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2)
        self.fc, self.head = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = self.fc(self.pool(self.relu(self.conv(x))).flatten(2).transpose(1, 2))
        return self.head(x * 2)


@functools.cache
def captured():
    torch.manual_seed(0)
    x = torch.randn(16, 2, 8, 8)
    return qlab.QuantSim(Small(), x), x


def small(**settings):
    sim, x = copy.deepcopy(captured()[0]), captured()[1]
    sim.configure("*", weight=settings)
    sim.calibrate([x])
    return sim, x


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    sim, _ = small()
    path = tmp_path_factory.mktemp("exported") / "m"
    sim.export(path)
    return path


class Reader(CalibrationDataReader):
    def __init__(self, x):
        self._feeds = iter([{"x": x.numpy()}])

    def get_next(self):
        return next(self._feeds, None)


def quantized_by_onnxruntime(exported, folder, **settings):
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8} | settings
    path = folder / "theirs.onnx"
    source = exported.with_name("m.float.onnx")
    quantize_static(str(source), str(path), Reader(captured()[1]), quant_format=QuantFormat.QDQ, **kinds)
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    return path, constants


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_a_grid_narrower_than_the_types_of_onnx_is_the_same_in_its_own_export(tmp_path, bits):
    sim, x = small()
    sim["fc"].weight.bits = sim["fc"].output.bits = bits
    sim.export(tmp_path / "m", formats=("onnx",))
    table = qlab.compare_encodings(sim, tmp_path / "m.onnx").set_index("tensor")
    assert set(table["state"]) == {"same"}
    stored = 4 if bits < 4 else 8
    assert tuple(table.loc["fc (weight)", ["bits", "other_bits"]]) == (bits, stored)
    assert table.loc["fc (weight)", "note"] == f"It is stored in {stored} bits."
    assert not [note for note in qlab.on_target(sim, tmp_path / "m.onnx", [x]).notes if "sim changed" in note]
    sim["fc"].weight.bits = bits + 1
    table = qlab.compare_encodings(sim, tmp_path / "m.onnx").set_index("tensor")
    assert list(table.index[table["state"] == "differs"]) == ["fc (weight)"]


@pytest.mark.parametrize("per_channel", [False, True])
def test_what_onnxruntimes_quantizer_found_stands_beside_the_sims_grids(exported, tmp_path, per_channel):
    path, constants = quantized_by_onnxruntime(exported, tmp_path, per_channel=per_channel)
    sim, _ = small(granularity="per_channel" if per_channel else "per_tensor", scheme="strict_symmetric")
    table = qlab.compare_encodings(sim, path).set_index("tensor")
    row = table.loc["x"]  # both take minimum and maximum of the same batch
    assert row["state"] == "same"
    assert row["other_scale"] == pytest.approx(float(constants["x_scale"]))
    assert row["other_zero_point"] == int(constants["x_zero_point"])
    row = table.loc["conv (weight)"]  # theirs is [-127, 127] as well
    assert row["state"] == "same"
    assert row["scale_difference"] < 1e-6
    assert np.isclose(row["scale"], constants["conv.weight_scale"], rtol=1e-6, atol=0).any()
    differing = table.loc["head"]  # theirs saw float weights, the sim rounded ones
    ours = sim["head"].output.encoding
    theirs = float(constants["head_scale"])
    assert differing["scale_difference"] == pytest.approx(abs(theirs - ours.scale.item()) / ours.scale.item(), rel=1e-4)
    assert differing["zero_point_difference"] == abs(
        int(ours.zero_point) - int(constants["head_zero_point"].astype(int))
    )


def test_a_signed_zero_point_is_the_same_as_an_unsigned_one_half_the_range_on(exported, tmp_path):
    path, constants = quantized_by_onnxruntime(exported, tmp_path, activation_type=QuantType.QInt8)
    sim, _ = small()
    row = qlab.compare_encodings(sim, path).set_index("tensor").loc["x"]
    assert constants["x_zero_point"].dtype == np.int8
    assert row["other_zero_point"] == int(constants["x_zero_point"]) + 128
    assert row["zero_point_difference"] == abs(int(sim["x"].output.encoding.zero_point) - row["other_zero_point"])


def test_a_weight_transposed_on_its_way_is_found(exported, tmp_path):
    path, _ = quantized_by_onnxruntime(exported, tmp_path)
    table = qlab.compare_encodings(small()[0], path).set_index("tensor")
    assert table.loc["fc (weight)", "other"] == "fc.weight"


def test_what_torchao_found_stands_beside_the_sims_grids_though_it_names_no_weight():
    folder = RECORDED.parent / "torchao"
    values = {name: torch.from_numpy(value) for name, value in np.load(folder / "small.npz").items()}
    x, model = values.pop("x"), Small()
    model.load_state_dict(values)
    sim = qlab.QuantSim(model, x, qlab.presets.w8a8(per_channel=True))
    sim.calibrate([x])
    constants = {i.name: numpy_helper.to_array(i) for i in onnx.load(folder / "small.onnx").graph.initializer}
    assert not {"conv.weight", "fc.weight", "head.weight"} & set(constants)
    table = qlab.compare_encodings(sim, folder / "small.onnx").set_index("tensor")
    assert set(table.index[table["state"] == "differs"]) == {*WEIGHTS, "x", "relu", "mul"}
    assert set(table.index[table["state"] == "only here"]) == {"fc", "head"}  # it rounds what kernels read, no more
    assert set(table["state"]) == {"differs", "only here"}
    for name in WEIGHTS:  # max / 127.5 there, max / 127 here
        assert table.loc[name, "scale_difference"] == pytest.approx(1 - 127 / 127.5, rel=1e-3)
        assert table.loc[name, "other_zero_point"] == 128
    scale = np.abs(values["fc.weight"].numpy()).max(1) / 127.5
    assert np.isclose(scale, table.loc["fc (weight)", "other_scale"], rtol=1e-6, atol=0).any()
    assert table.loc[["x", "relu", "mul"], "scale_difference"].max() < 0.01  # its ranges are a histogram's


WEIGHTS = ("conv (weight)", "fc (weight)", "head (weight)")


def test_what_matches_nothing_is_listed_with_the_nearest_names(exported, tmp_path):
    model = onnx.load(exported.with_suffix(".onnx"))
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("head", "heat") for name in names]
    for value in (*model.graph.output, *model.graph.initializer):
        value.name = value.name.replace("head", "heat")
    onnx.save(model, tmp_path / "renamed.onnx")
    table = qlab.compare_encodings(small()[0], tmp_path / "renamed.onnx")
    theirs = table[table["state"] == "only there"].set_index("other")
    assert set(theirs.index) == {"heat", "heat.weight"}
    assert "'head'" in theirs.loc["heat", "note"]
    assert set(table.loc[table["state"] == "only here", "tensor"]) == {"head", "head (weight)"}
    assert theirs.loc["heat", "other_scale"] == pytest.approx(small()[0]["head"].output.encoding.scale.item())


@pytest.mark.parametrize("suffix", [".onnx", ".encodings"])
def test_the_sims_own_files_say_the_same(exported, suffix):
    table = qlab.compare_encodings(small()[0], exported.with_suffix(suffix))
    assert set(table["state"]) == {"same"}
    assert (table["scale_difference"] == 0).all()
    assert len(table) == 8


def test_blocks_and_channels_are_compared_where_they_differ_most(tmp_path):
    first, second = small(granularity="per_block(3)")[0], small(granularity="per_channel")[0]
    table = qlab.compare_encodings(first, second).set_index("tensor")
    ours, theirs = first["fc"].weight.encoding.scale, second["fc"].weight.encoding.scale
    gaps = (theirs[:, None] - ours).abs() / ours
    assert table.loc["fc (weight)", "scale_difference"] == pytest.approx(gaps.max().item())
    assert table.loc["fc (weight)", "scale"] == pytest.approx(ours.reshape(-1)[gaps.argmax()].item())
    assert table.loc["x", "state"] == "same"


def test_bits_that_differ_and_quantizers_that_are_off_are_told():
    first, second = small()[0], small()[0]
    second["fc"].output.bits = 4
    second["conv"].weight.enabled = False
    first["mul"].output.enabled = False
    table = qlab.compare_encodings(first, second).set_index("tensor")
    assert table.loc["fc", ["state", "bits", "other_bits"]].tolist() == ["differs", 8, 4]
    assert table.loc["conv (weight)", "state"] == "only here"
    assert table.loc["mul", "state"] == "only there"
    assert "off" in table.loc["mul", "note"]


def test_a_recorded_file_of_aimet_is_compared_as_it_is_loaded(reference_sim):
    sim = reference_sim("per_channel")
    sim.calibrate([recorded()["input"]])
    table = qlab.compare_encodings(sim, RECORDED / "encodings" / "per_channel-1.0.0.encodings")
    assert table["scale_difference"].max() < 5e-7
    assert table["zero_point_difference"].max() == 0
    assert set(table["state"]) == {"same"}


def test_nothing_is_changed(exported):
    sim, x = small()
    before, frame = sim.output(x), sim.to_pandas()
    qlab.compare_encodings(sim, exported.with_suffix(".onnx"))
    assert torch.equal(sim.output(x), before)
    pd.testing.assert_frame_equal(sim.to_pandas(), frame)


def test_what_is_no_encoding_is_refused_with_a_sentence(exported, tmp_path):
    sim, _ = small()
    (tmp_path / "garbage.onnx").write_bytes(b"\xff\x00 garbage")
    for other, sentence in (
        (tmp_path / "garbage.onnx", "cannot be read as an ONNX model"),
        (tmp_path / "none.onnx", "cannot be read as an ONNX model"),
        (exported.with_name("m.float.onnx"), r"QuantFormat\.QDQ"),
        (tmp_path / "none.encodings", "cannot be read"),
        (3, "takes a path"),
    ):
        with pytest.raises(InputError, match=sentence):
            qlab.compare_encodings(sim, other)
