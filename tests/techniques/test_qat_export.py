"""After training: BatchNorm measured anew, folded into the scale, exported; ONNX Runtime computes what the sim does."""

import onnxruntime
import pytest
import torch
from torch import nn

import qlab
from tests.techniques.models import lived


def trained(mode: str) -> tuple[qlab.QuantSim, list]:
    torch.manual_seed(0)
    model = lived(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
        )
    )  # fmt: skip
    x = torch.randn(96, 2, 8, 8)
    y = model(x).argmax(1)
    labelled = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]
    sim = qlab.QuantSim(model, x[:2], qlab.presets.w4a8())
    sim.calibrate(labelled)
    qlab.QAT(mode=mode, epochs=2, learning_rate=1e-2).apply(sim, labelled)
    return sim, labelled


@pytest.mark.parametrize("mode", ["regular", "range_learning"])
def test_a_trained_sim_is_reestimated_folded_into_the_scale_and_runs_the_same_exported(mode, tmp_path):
    sim, labelled = trained(mode)
    report = qlab.BatchNormReestimation(fold=True).apply(sim, labelled)
    assert any("folded 2 of 2" in note for note in report.notes)
    assert sim["0"].weight.encoding.scale.shape == (8,)  # gamma / sigma of each channel is in the scale
    exported = tmp_path / "trained"
    sim.export(exported)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(f"{exported}.onnx", options, providers=["CPUExecutionProvider"])
    step = float(sim["7"].output.encoding.scale)
    steps = []
    for x, _ in labelled:
        (there,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        steps.append(((torch.from_numpy(there) - sim.output(x)) / step).round().abs())
    assert torch.cat(steps).max() <= 1
    assert (torch.cat(steps) == 0).float().mean() > 0.97


def test_folding_after_training_keeps_every_integer_and_the_result():
    sim, labelled = trained("range_learning")
    qlab.BatchNormReestimation().apply(sim, labelled)
    before, codes = sim.output(labelled[0]), integers(sim, "0")
    qlab.BatchNormFolding(keep_integers=True).apply(sim)
    assert torch.equal(integers(sim, "0"), codes)
    step = float(sim["7"].output.encoding.scale)
    moved = ((sim.output(labelled[0]) - before) / step).round().abs()
    assert moved.max() <= 1
    assert (moved == 0).float().mean() > 0.97


def integers(sim: qlab.QuantSim, layer: str) -> torch.Tensor:
    """The integers of a layer's weight, up to the sign that a negative gamma turns."""
    weight = sim[layer].weight
    scale = weight.encoding.scale.reshape(-1, *[1] * (weight.weight.dim() - 1))
    return (weight.quantized().detach() / scale).round().abs()
