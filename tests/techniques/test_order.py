"""The order of steps is safe: what was learned stays in force, or the step that ends it says so."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.quantization import quantize
from qlab.techniques import TECHNIQUES, Report, Technique
from tests.techniques.models import lived, relative


@dataclass(frozen=True)
class _Upwards(Technique):
    """A rounding technique in its simplest form: every weight goes to the next integer above."""

    def run(self, sim, batches, score, progress) -> Report:
        for layer in sim.layers.values():
            if layer.weight is not None:
                encoding = layer.weight.required_encoding()
                codes = quantize(layer.weight.weight, encoding) + 1
                layer.weight.set_rounding(codes.clamp(encoding.qmin, encoding.qmax))
        return Report("Upwards", "rounded up")


ROUNDING = {"by hand": _Upwards()}
if "AdaRound" in TECHNIQUES:
    ROUNDING["AdaRound"] = TECHNIQUES["AdaRound"](iterations=50)
if "GPTQ" in TECHNIQUES:
    ROUNDING["GPTQ"] = TECHNIQUES["GPTQ"]()


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def original() -> qlab.QuantSim:
    """Two pairs that can be equalized, BatchNorm folded; not calibrated."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    sim = qlab.QuantSim(lived(model), torch.randn(2, 3, 8, 8), qlab.presets.w4a8())
    qlab.BatchNormFolding().apply(sim)
    return sim


def roundings(sim: qlab.QuantSim) -> dict[str, Tensor]:
    return {name: layer.weight.rounding for name, layer in sim.layers.items() if layer.weight is not None}


@pytest.mark.parametrize("name", ROUNDING)
def test_calibration_before_or_after_leaves_the_rounding_in_force(original, name):
    sim = copy.deepcopy(original)
    sim.calibrate(data())
    ROUNDING[name].apply(sim, data())
    chosen = roundings(sim)
    assert all(codes is not None for codes in chosen.values())
    weights = {layer: sim[layer].weight.quantized().clone() for layer in chosen}
    nearest = copy.deepcopy(original)
    assert any(not torch.equal(weights[layer], nearest[layer].weight.quantized()) for layer in chosen)
    for _ in range(2):
        sim.calibrate(data())
        for layer, codes in chosen.items():
            assert torch.equal(sim[layer].weight.rounding, codes)
            assert torch.equal(sim[layer].weight.quantized(), weights[layer])
    uncalibrated = copy.deepcopy(original)
    ROUNDING[name].apply(uncalibrated, data())
    chosen = roundings(uncalibrated)
    uncalibrated.calibrate(data())
    assert all(torch.equal(roundings(uncalibrated)[layer], codes) for layer, codes in chosen.items())


@pytest.mark.parametrize("calibrates", [True, False])
@pytest.mark.parametrize("name", ROUNDING)
def test_equalizing_afterwards_says_which_roundings_it_ends_and_leaves_none_half_valid(original, name, calibrates):
    sim = copy.deepcopy(original)
    sim.calibrate(data())
    ROUNDING[name].apply(sim, data())
    report = qlab.CrossLayerEqualization().apply(sim, data() if calibrates else None)
    for layer in ("0", "3", "7"):
        weight = sim[layer].weight
        told = any(f"{layer!r}" in note and "the rounding chosen for it" in note for note in report.notes)
        assert told
        assert weight.rounding is None
        assert not weight.rounding_is_stale
        assert not weight.frozen
        scale = weight.required_encoding().scale
        assert float((weight.quantized() - weight.weight).detach().abs().max()) <= float(scale) * 0.5001
    if not calibrates:
        sim.calibrate(data())
    fresh = copy.deepcopy(original)
    qlab.CrossLayerEqualization().apply(fresh)
    fresh.calibrate(data())
    assert torch.equal(sim.output(data()[0]), fresh.output(data()[0]))
    ROUNDING[name].apply(sim, data())
    assert all(codes is not None for codes in roundings(sim).values())


@pytest.mark.parametrize("name", ROUNDING)
def test_equalizing_keeps_a_rounding_where_only_outputs_of_a_channel_grid_are_scaled(original, name):
    sim = copy.deepcopy(original)
    sim.configure("*", weight={"granularity": "per_channel"})
    ROUNDING[name].apply(sim, data())
    codes = roundings(sim)["0"]
    report = qlab.CrossLayerEqualization().apply(sim)
    assert torch.equal(sim["0"].weight.rounding, codes)
    assert not any("'0'" in note for note in report.notes)
    assert any("'7'" in note for note in report.notes)


@pytest.mark.parametrize("name", ROUNDING)
def test_a_rounding_survives_the_file_after_equalization_and_folding(original, name, tmp_path):
    sim = copy.deepcopy(original)
    qlab.CrossLayerEqualization().apply(sim)
    sim.calibrate(data())
    ROUNDING[name].apply(sim, data())
    qlab.BiasCorrection().apply(sim, data())
    sim.save(tmp_path / "sim.safetensors")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    loaded = qlab.load(tmp_path / "sim.safetensors", model, torch.randn(2, 3, 8, 8))
    assert torch.equal(loaded.output(data()[0]), sim.output(data()[0]))
    assert all(torch.equal(roundings(loaded)[layer], codes) for layer, codes in roundings(sim).items())


def test_bias_correction_sees_what_came_before_it_and_goes_with_a_scaled_channel(original):
    sim = copy.deepcopy(original)
    sim.configure("*", weight={"granularity": "per_channel"})
    sim.calibrate(data())
    qlab.BiasCorrection().apply(sim, data())
    before, correction = sim.output(data()[0]), sim["0"].weight.bias_correction
    bias = sim.model[0].bias.detach().clone()
    report = qlab.CrossLayerEqualization(absorb_bias=False).apply(sim, data())
    factors = sim.model[0].bias.detach() / bias
    assert torch.allclose(sim["0"].weight.bias_correction, correction * factors, rtol=1e-4)
    assert any("'7'" in note and "its bias correction" in note for note in report.notes)
    assert sim["7"].weight.bias_correction is None
    assert relative(sim.output(data()[0]), before) < 0.5
