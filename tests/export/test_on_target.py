"""The proof on target: ONNX Runtime beside the sim, with its optimisations off and with its integer kernels."""

import functools

import pytest
import torch
from torch import nn

import qlab
from qlab.errors import InputError
from tests.export.conftest import network, run_onnx, sim_of

pytestmark = pytest.mark.usefixtures("traced_once")
NETWORKS = ["mobilenet", "resnet", "vit", "gpt"]
SIMULATED = {False: qlab.presets.w8a8, True: qlab.presets.onnxruntime}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(sim, file) of a network and preset, each exported once."""

    @functools.cache
    def make(name, optimised, per_channel=False):
        sim = sim_of(name, SIMULATED[optimised](per_channel=per_channel))
        path = tmp_path_factory.mktemp(name) / "model"
        sim.export(path, formats=["onnx"])
        return sim, path.with_suffix(".onnx")

    return make


def share_identical(sim, path, batches, optimised):
    """The share of equal integers by ONNX Runtime itself, without qlab.on_target."""
    grid = sim[sim.graph.outputs[0].name].output.encoding
    pairs = [(sim.output(x), run_onnx(path, x, optimised=optimised)[0]) for x, _ in batches]
    return torch.cat([((a - b).abs() < grid.scale / 2).float().flatten() for a, b in pairs]).mean().item()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_with_optimisations_off_the_integers_are_the_sims(exported, name, per_channel):
    sim, path = exported(name, False, per_channel)
    result = qlab.on_target(sim, path, network(name).test, optimised=False)
    assert result.identical >= 0.985
    assert result.top_1 >= 0.995
    assert result.identical == pytest.approx(share_identical(sim, path, network(name).test, False))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_with_integer_kernels_the_integers_are_those_of_the_sim_that_computes_as_they_do(exported, name, per_channel):
    sim, path = exported(name, True, per_channel)
    result = qlab.on_target(sim, path, network(name).test)
    assert result.identical >= 0.95
    assert result.top_1 >= 0.995
    assert result.identical == pytest.approx(share_identical(sim, path, network(name).test, True))


def test_integer_kernels_are_what_runs(exported):
    sim, path = exported("mobilenet", True)
    layers = qlab.on_target(sim, path, network("mobilenet").test[:1], layers=True).layers
    convolutions = layers[layers["kind"].isin(["relu", "identity"])]
    assert len(convolutions) == 26
    assert set(convolutions["kernel"]) == {"QLinearConv"}


def test_a_sim_that_computes_in_float_is_told_from_one_that_computes_as_the_target(exported):
    _, path = exported("mobilenet", True)
    sim = sim_of("mobilenet", qlab.presets.w8a8())
    result = qlab.on_target(sim, path, network("mobilenet").test)
    assert result.identical < 0.95
    assert "presets.onnxruntime()" in " ".join(result.notes)


def test_a_kernel_that_rounds_differently_is_named_and_layers_after_it_are_not(exported):
    """Softmax lies on steps of 1/255 here, where its integer kernel multiplies by 254."""
    sim = sim_of("vit", qlab.presets.w8a8(int32_bias=True))
    _, path = exported("vit", True)
    path = path.with_name("other.onnx")
    sim.export(path.with_suffix(""), formats=["onnx"])
    result = qlab.on_target(sim, path, network("vit").test, layers=True)
    assert result.kernels["kernel"].iloc[0] == "QLinearSoftmax"
    assert result.kernels["first"].iloc[0] == "blocks.0.attention.softmax"
    assert "QLinearSoftmax" in repr(result)
    after = result.layers.set_index("layer").loc["blocks.0.attention.matmul_1"]
    assert after["differing"] > 0
    assert after["differing_alone"] == 0


def test_the_score_on_target_stands_beside_the_simulated_and_the_float_one(exported):
    sim, path = exported("mobilenet", True)
    labelled = network("mobilenet").test
    summary = qlab.on_target(sim, path, labelled, score=qlab.Accuracy(labelled)).summary.set_index("measure")
    right = sum((run_onnx(path, x, optimised=True)[0].argmax(1) == y).sum().item() for x, y in labelled)
    assert summary.loc["accuracy", "on_target"] == pytest.approx(right / 128)
    assert summary.loc["accuracy", "simulated"] == sim.evaluate(qlab.Accuracy(labelled))
    assert summary.loc["accuracy", "float"] == sim.evaluate(qlab.Accuracy(labelled), quantized=False)
    assert summary.loc["file [KiB]", "on_target"] == path.stat().st_size / 1024
    assert (summary.loc["latency [ms a batch]", ["float", "on_target"]] > 0).all()


def test_a_function_of_a_model_scores_the_file_as_well(exported):
    sim, path = exported("mobilenet", True)
    x = network("mobilenet").test[0][0]
    result = qlab.on_target(sim, path, [x], score=lambda model: model(x)[0, 0])
    assert result.summary["on_target"].iloc[-1] == pytest.approx(run_onnx(path, x, optimised=True)[0][0, 0].item())


def test_it_shows_itself_as_text_and_as_escaped_html(exported):
    sim, path = exported("mobilenet", True)
    result = qlab.on_target(sim, path, network("mobilenet").test[:1])
    assert "of the integers are the sim's" in repr(result)
    assert result._repr_html_().count("<table>") == 2
    looked_into = qlab.on_target(sim, path, network("mobilenet").test[:1], layers=True)
    shown = looked_into._repr_html_().split("<details>")[1]
    assert all(f"<td>{name}</td>" in shown for name in looked_into.layers["layer"])
    assert "<b>" not in qlab.on_target(sim, rename(path, "<b>x"), network("mobilenet").test[:1])._repr_html_()[6:]


def rename(path, name):
    copy = path.with_name(f"{name}.onnx")
    copy.write_bytes(path.read_bytes())
    return copy


def test_nothing_is_changed(exported):
    sim, path = exported("mobilenet", True)
    x = network("mobilenet").test[0][0]
    sim.train()
    before = {key: value.clone() for key, value in sim.state_dict().items()}
    qlab.on_target(sim, path, [x], layers=True, score=qlab.SQNR([x]))
    assert all(torch.equal(before[key], value) for key, value in sim.state_dict().items())
    assert sim.training
    sim.eval()


def test_a_file_exported_before_a_change_is_told(exported):
    sim, path = exported("mobilenet", True)
    changed = sim_of("mobilenet", sim.preset)
    changed["stem.relu"].output.set_range(0.0, 0.5)
    result = qlab.on_target(changed, path, network("mobilenet").test[:1])
    assert "'stem.relu'" in result.notes[0]
    assert not qlab.on_target(sim, path, network("mobilenet").test[:1]).notes


class TwoOfEach(nn.Module):
    """Two inputs; results in a dict: one on a grid, one of integers, one twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, a, b):
        logits = self.left(a) + self.right(b)
        return {"logits": logits, "class": logits.argmax(-1), "again": (logits, None)}


def test_several_inputs_and_results_in_the_models_own_structure(tmp_path):
    torch.manual_seed(0)
    batches = [{"a": torch.randn(8, 4), "b": torch.randn(8, 5), "labels": torch.zeros(8).long()} for _ in range(2)]
    sim = qlab.QuantSim(TwoOfEach(), batches[0], qlab.presets.onnxruntime())
    sim.calibrate(batches)
    sim.export(tmp_path / "m", formats=["onnx"])
    seen = []

    def score(model):
        seen.append(model(batches[0]["a"], batches[0]["b"]))
        return 1.0

    result = qlab.on_target(sim, tmp_path / "m.onnx", batches, score=score, layers=True)
    assert list(result.outputs["values"]) == [96, 16, 96]
    assert (result.outputs["identical"] > 0.9).all()
    simulated, on_target = seen[1], seen[2]
    assert on_target.keys() == simulated.keys()
    assert on_target["again"][1] is None
    assert torch.equal(on_target["class"], on_target["logits"].argmax(-1))
    assert torch.equal(on_target["again"][0], on_target["logits"])


def test_a_cancelled_check_leaves_the_sim_as_it_was(exported):
    sim, path = exported("mobilenet", True)

    class Cancelling:
        def step(self, done, total, text=""):
            raise qlab.errors.Cancelled("enough")

    sim.train()
    with pytest.raises(qlab.errors.Cancelled):
        qlab.on_target(sim, path, network("mobilenet").test, progress=Cancelling())
    assert sim.training
    sim.eval()


@pytest.mark.parametrize(
    ("batches", "name", "sentence"),
    [
        ([], None, "empty"),
        (None, "none.onnx", "there is no file"),
        (None, "garbage.onnx", "ONNX Runtime cannot run"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_a_sentence(exported, tmp_path, batches, name, sentence):
    sim, path = exported("mobilenet", True)
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(InputError, match=sentence):
        qlab.on_target(sim, tmp_path / name if name else path, network("mobilenet").test if batches is None else [])


def test_a_file_of_another_model_is_refused(exported, tmp_path):
    _, path = exported("mobilenet", True)
    x = torch.randn(2, 3)
    sim = qlab.QuantSim(nn.Sequential(nn.Linear(3, 2)), x)
    sim.calibrate([x])
    with pytest.raises(InputError, match="Export this sim"):
        qlab.on_target(sim, path, [x])
