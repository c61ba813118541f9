"""Running statistics become those of the quantized network; what gains nothing is said or taken back."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import qlab
from qlab.errors import InputError
from tests.techniques.models import calibrated, images, lived, relative


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(16, 3, 8, 8) + 0.3 * i for i in range(count)]


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_without_quantizers_it_is_what_torch_averages_in_training():
    model, data = lived(images()), batches()
    sim = calibrated(model, data[0])
    sim.configure("*", weight={"enabled": False}, output={"enabled": False})
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn(data, reference)  # a cumulative average over batches
    report = qlab.BatchNormReestimation().apply(sim, data)
    assert report.values["batches"] == 4
    assert len(report.rows) == 5
    for have, want in zip(norms(sim.model), norms(reference), strict=True):
        assert torch.allclose(have.running_mean, want.running_mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(have.running_var, want.running_var, rtol=1e-4)


def test_statistics_are_those_of_the_quantized_network():
    data = batches()
    sim = calibrated(lived(images()), data[0], qlab.presets.w4a8())
    conv = sim["0"]
    with torch.no_grad():
        inputs = [sim["input"].output(x) for x in data[:2]]
        outputs = [torch.nn.functional.conv2d(x, conv.weight.quantized(), sim.model[0].bias, padding=1) for x in inputs]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    qlab.BatchNormReestimation(batches=2).apply(sim, data)
    assert torch.allclose(sim.model[1].running_mean, mean, atol=1e-6)
    assert torch.allclose(sim.model[1].running_var, variance, rtol=1e-5)


def test_statistics_that_do_not_fit_are_mended_and_the_report_says_what_it_gained():
    digits = qlab.examples.digits()
    sim = qlab.QuantSim(qlab.examples.resnet(), digits.train_images[:2], qlab.presets.w4a8())
    sim.calibrate(digits.calibration(4))
    with torch.no_grad():
        for norm in norms(sim.model):
            norm.running_var.mul_(2.5)
            norm.running_mean.add_(0.4 * norm.running_var.sqrt())
    score = qlab.Accuracy(digits.test[:3])
    report = qlab.BatchNormReestimation(batches=10).apply(sim, digits.train, score=score)
    assert report.values["before"] < 0.5
    assert report.values["after"] > 0.9
    assert "before" in report.summary
    assert "nothing to gain" not in report.summary
    assert sim.evaluate(score) == report.values["after"]
    assert "sim.calibrate(batches)" in report.notes[0]  # ranges were measured with other statistics


@pytest.mark.parametrize("build", [qlab.examples.mobilenet, qlab.examples.resnet])
def test_after_training_at_four_bits_it_gains_and_a_second_time_there_is_nothing_to_gain(build):
    digits = qlab.examples.digits()
    sim = qlab.QuantSim(build(), digits.train_images[:2], qlab.presets.w4a4())
    sim.calibrate(digits.calibration(4))
    # A large step moves weights faster than running averages follow.
    qlab.QAT(mode="regular", epochs=1, learning_rate=1e-2).apply(sim, digits.train[:12])
    score = qlab.Accuracy(digits.test[:3])
    first, second = (qlab.BatchNormReestimation().apply(sim, digits.train[:20], score=score) for _ in range(2))
    assert first.values["after"] > first.values["before"] + 0.3
    assert "nothing to gain" not in first.summary
    assert second.values["after"] == second.values["before"] == sim.evaluate(score)
    assert "nothing to gain" in second.summary


def test_a_score_that_falls_brings_the_old_statistics_back():
    data = batches()
    sim = calibrated(lived(images()), data[0])
    before = copy.deepcopy(sim.state_dict())
    calls = []

    def falling(model: nn.Module) -> float:
        calls.append(model)
        return -float(len(calls))

    report = qlab.BatchNormReestimation().apply(sim, data, score=falling)
    assert "nothing to gain, the old statistics are back" in report.summary
    assert all(torch.equal(v, before[k]) for k, v in sim.state_dict().items())


def test_statistics_that_fit_already_leave_nothing_to_gain():
    data = batches()
    sim = calibrated(lived(images()), data[0])
    first = qlab.BatchNormReestimation().apply(sim, data)
    assert "nothing to gain" not in first.summary
    assert max(row["mean_moved"] for row in first.rows) > 0.1
    assert "nothing to gain" in qlab.BatchNormReestimation().apply(sim, data).summary


@pytest.mark.parametrize("per_channel", [True, False])
def test_folding_afterwards_keeps_what_the_sim_computes(per_channel):
    data = batches()
    preset = qlab.presets.w4a8(per_channel=per_channel)
    model = nn.Sequential(*images()[:10])  # without the grouped transposed convolution, whose grid spans groups
    sim, twin = calibrated(lived(model), data[0], preset), calibrated(lived(model), data[0], preset)
    sim.configure("*", weight={"scheme": "strict_symmetric"})
    twin.configure("*", weight={"scheme": "strict_symmetric"})
    qlab.BatchNormReestimation().apply(twin, data)
    report = qlab.BatchNormReestimation(fold=True).apply(sim, data)
    assert "then folded 3 of 3 BatchNorms." in report.notes
    assert not norms(sim.model)
    assert relative(sim.output(data[0]), twin.output(data[0])) < 2e-3  # a rounding at a half point may fall either way


def test_a_norm_called_twice_takes_the_mean_of_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) * 2 + 5)

    sim = qlab.QuantSim(Twice(), torch.randn(4, 3))
    qlab.BatchNormReestimation().apply(sim, [torch.randn(5000, 3) + 1])
    assert torch.allclose(sim.model.norm.running_mean, torch.full((3,), (1 + 5) / 2), atol=0.1)
    assert torch.allclose(sim.model.norm.running_var, torch.full((3,), (1 + 4) / 2), atol=0.2)


def test_the_training_mode_of_every_module_is_as_before():
    data = batches()
    sim = calibrated(lived(images()), data[0])
    sim.train()
    sim.model[1].eval()
    qlab.BatchNormReestimation().apply(sim, data)
    assert sim.training
    assert not sim.model[1].training
    assert sim.model[4].training


def test_bad_data_is_a_sentence_and_a_model_without_batch_norm_a_report():
    sim = qlab.QuantSim(lived(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), torch.randn(4, 3))
    with pytest.raises(InputError, match="at least one batch"):
        qlab.BatchNormReestimation().apply(sim, [])
    with pytest.raises(InputError, match="'1' sees one value a channel"):
        qlab.BatchNormReestimation().apply(sim, [torch.randn(1, 3)])
    with pytest.raises(InputError, match="needs data"):
        qlab.BatchNormReestimation().apply(sim)
    qlab.BatchNormFolding().apply(sim)
    report = qlab.BatchNormReestimation().apply(sim, [torch.randn(4, 3)])
    assert report.summary == "the model has no BatchNorm with running statistics: nothing to do"
