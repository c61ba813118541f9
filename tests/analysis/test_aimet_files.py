"""The files of AIMET's analyzer: its names, its shapes of JSON, and the numbers of the tables."""

import dataclasses
import json
import os

import pandas as pd
import pytest

import qlab
from tests.analysis.small import calibrated, data


@pytest.fixture(scope="module")
def analysis():
    sim = calibrated(qlab.presets.w4a8(per_channel=True))
    sim["head"].weight.granularity = "per_tensor"
    return qlab.QuantAnalyzer(bits=(None, 3), estimate=False).measure(sim, data(), qlab.Accuracy(data()))


@pytest.fixture(scope="module")
def folder(analysis, tmp_path_factory):
    return analysis.export(tmp_path_factory.mktemp("aimet") / "results")


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_the_names_are_those_that_scripts_look_for(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "per_layer_quant_enabled.json",
        "per_layer_quant_enabled.html",
        "per_layer_quant_disabled.json",
        "per_layer_quant_disabled.html",
        "per_layer_mse_loss.json",
        "per_layer_mse_loss.html",
        "min_max_ranges/weights.json",
        "min_max_ranges/weights.html",
        "min_max_ranges/activations.json",
        "min_max_ranges/activations.html",
        "min_max_ranges/stem.0_weight.html",  # by channel
        "activations_pdf/head_output_0.html",
        "activations_pdf/stem.2_output_0.html",
        "weights_pdf/head/weight_0.html",
        "weights_pdf/stem.0/weight_0.html",
    } <= names
    assert not [name for name in names if name.endswith(".part")]
    assert {name for name in names if name.endswith("_3.json")} == {
        "per_layer_quant_enabled_3.json",
        "per_layer_quant_disabled_3.json",
    }


@pytest.mark.parametrize("mode", ["enabled", "disabled"])
@pytest.mark.parametrize(("bits", "suffix"), [("as set", ""), ("3", "_3")])
def test_scores_map_layer_to_number(analysis, folder, mode, bits, suffix):
    table = analysis.table(mode)
    table = table[table.bits == bits]
    found = read(folder / f"per_layer_quant_{mode}{suffix}.json")
    assert found == dict(zip(table.layer, table.score, strict=True))
    assert list(found) == list(table.layer)  # in the order of execution


def test_errors_of_layers_map_layer_to_number(analysis, folder):
    noise = analysis.noise
    assert read(folder / "per_layer_mse_loss.json") == dict(zip(noise.layer, noise.mse, strict=True))


def test_ranges_are_a_pair_or_a_pair_for_each_channel(analysis, folder):
    weights, activations = (read(folder / "min_max_ranges" / f"{name}.json") for name in ("weights", "activations"))
    sim = analysis.sim
    for layer in ("stem.0", "depthwise.0", "left", "right"):
        encoding = sim[layer].weight.encoding
        pairs = zip(encoding.minimum.tolist(), encoding.maximum.tolist(), strict=True)
        assert weights[f"{layer}_weight"] == {f"{layer}_weight_{i}": list(pair) for i, pair in enumerate(pairs)}
    head = sim["head"].weight.encoding
    assert weights["head_weight"] == [float(head.minimum), float(head.maximum)]
    for name, pair in activations.items():
        encoding = sim[name.removesuffix("_output_0")].output.encoding
        assert pair == [float(encoding.minimum), float(encoding.maximum)]
    assert {"x_output_0", "stem.2_output_0", "head_output_0"} <= set(activations)


def test_pages_ask_for_nothing(folder):
    for path in folder.rglob("*.html"):
        head, _, body = path.read_text().partition("<body")
        assert "<link" not in head, path
        for script in body.split("<script")[1:]:
            assert "src=" not in script.partition(">")[0], path
        assert "<svg" in body or "bk-" in body or "qlab-plot" in body, path


def test_rows_of_quantizers_have_names_of_their_own(tmp_path):
    analyzer = qlab.QuantAnalyzer(by="quantizer", layers="head", estimate=False, disabled=False)
    folder = analyzer.measure(calibrated(), data()).export(tmp_path)
    assert list(read(folder / "per_layer_quant_enabled.json")) == ["head weight", "head output"]
    assert not (folder / "per_layer_quant_disabled.json").exists()


def test_a_folder_that_cannot_be_written_is_said(analysis, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "results", tmp_path / "file" / "deep" / "results"):
        with pytest.raises(OSError, match=r"cannot make '.*Choose another folder"):
            analysis.export(place)
    with pytest.raises(NotADirectoryError, match=r"is a file, not a folder. Choose another"):
        analysis.export(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_writes_nothing_and_keeps_what_was_there(analysis, tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "per_layer_quant_enabled.json").write_text("{}")
    broken = dataclasses.replace(analysis, histograms=pd.DataFrame({"layer": ["head"], "part": ["weight"]}))
    with pytest.raises(ValueError, match="left"):
        broken.export(folder)
    assert os.listdir(tmp_path) == ["results"]
    assert os.listdir(folder) == ["per_layer_quant_enabled.json"]
    assert (folder / "per_layer_quant_enabled.json").read_text() == "{}"
