"""Diagnoses of layers made hard on purpose: the parts add up, the cause is named, the fix does what it said."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.analysis.decomposition import PARTS, decompose
from qlab.analysis.diagnosis import diagnose
from qlab.analysis.group import Group
from qlab.errors import InputError, NotCalibrated, UnknownLayer
from qlab.examples import digits, mobilenet, rescale
from tests.analysis.small import branches, calibrated, data


def sim_of(model: nn.Module, x: Tensor, preset=None) -> qlab.QuantSim:
    sim = qlab.QuantSim(model.eval(), x, preset or qlab.presets.w8a8())
    sim.calibrate([x])
    return sim


@pytest.mark.parametrize("layer", ["x", "stem.0", "depthwise.1", "add", "right", "mean", "head"])
@pytest.mark.parametrize("preset", [qlab.presets.w4a4(), qlab.presets.w4a8(int32_bias=True)])
def test_the_parts_add_up_to_the_error_of_the_output(layer, preset):
    sim = calibrated(preset)
    group = Group.of(sim, layer)
    parts, sqnr = decompose(sim, group, data())
    assert parts.part.tolist() == list(PARTS)
    assert parts.share.sum() == pytest.approx(1, abs=1e-6)
    noise = qlab.analysis.layer_noise(sim, data()).set_index("layer")
    assert sqnr == pytest.approx(noise.sqnr[group.last.name], abs=1e-4)
    if group.weight is None:
        assert (parts.set_index("part").mse[["weight rounding", "weight clipping"]] == 0).all()


def test_each_part_is_what_that_step_alone_does():
    sim = calibrated(qlab.presets.w4a4())
    group = Group.of(sim, "head")
    parts = decompose(sim, group, data()[:1])[0].set_index("part").mse
    seen = {}

    def record(layer, args, kwargs):
        if layer.name == "head":
            seen["input"] = args[0]
        seen[layer.name] = sim.call(layer, args, kwargs)
        return seen[layer.name]

    with torch.no_grad():
        sim.graph.run(sim.inputs(data()[0]), record)
        head, y = sim.model.head, sim.float_output(data()[0])
        given = head(seen["input"])
        rounded = nn.functional.linear(seen["input"], sim["head"].weight.quantized(), head.bias)
    assert parts["inherited"] == pytest.approx(float((given - y).double().square().mean()), rel=1e-5)
    assert parts["weight rounding"] + parts["weight clipping"] == pytest.approx(
        float((rounded - given).double().square().mean()), rel=1e-4
    )
    output = parts["output rounding"] + parts["output clipping"]  # on different values, so their energies add up
    assert output == pytest.approx(float((seen["head"] - rounded).double().square().mean()), rel=1e-4)


def test_an_outlier_channel_of_a_weight_is_named():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 32, 3)
    with torch.no_grad():
        conv.weight[17] *= 40
    sim = sim_of(nn.Sequential(conv), torch.randn(16, 4, 8, 8), qlab.presets.w4a8())
    found = diagnose(sim, "0", [torch.randn(8, 4, 8, 8)])
    assert found.causes[0][0] == "weight rounding"
    assert "outlier channel 17 reaches" in found.cause


def test_the_spread_of_depthwise_channels_is_named_and_a_scale_per_channel_helps_most():
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 24, 3, groups=24, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.randn_like(conv.weight).clamp(-1, 1))
        conv.weight /= conv.weight.abs().amax((1, 2, 3), keepdim=True)
        conv.weight *= torch.logspace(0, math.log10(480), 24).view(-1, 1, 1, 1)
        x = torch.randn(16, 24, 8, 8) / torch.logspace(0, math.log10(480), 24).view(1, -1, 1, 1)
    sim = sim_of(nn.Sequential(conv), x, qlab.presets.w4a8())
    sim["input"].output.enabled = False
    found = diagnose(sim, "0", [x])
    assert found.causes[0][0] == "weight rounding"
    assert "range spread of depthwise channels 480x" in found.cause
    best = next(fix for fix in found.fixes if fix.verb == "set" and "granularity" in fix.arguments)
    assert best.predicted_gain > 3


def test_an_outlier_channel_of_an_output_is_named():
    torch.manual_seed(0)
    linear = nn.Linear(16, 40)
    with torch.no_grad():
        linear.weight[5] *= 60
    x = torch.randn(64, 16)
    sim = sim_of(nn.Sequential(linear), x, qlab.presets.w8a8(per_channel=True))
    sim["0"].output.bits = 4
    found = diagnose(sim, "0", [x])
    assert found.causes[0][0] == "output rounding"
    assert "outlier channel 5 reaches" in found.cause


def test_outlier_dimensions_of_a_layer_norm_are_named():
    torch.manual_seed(0)
    norm = nn.LayerNorm(48)
    with torch.no_grad():
        norm.weight[[3, 30]] = 50.0
    x = torch.randn(32, 10, 48)
    sim = sim_of(nn.Sequential(norm, nn.Linear(48, 8)), x)
    sim["0"].output.bits = 4
    found = diagnose(sim, "0", [x])
    assert "LayerNorm outlier dimensions" in found.cause
    assert "3" in found.cause
    assert "30" in found.cause


def test_the_range_of_a_relu6_is_named():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 12, 1)
    sim = sim_of(nn.Sequential(conv, nn.ReLU6()), 4 * torch.randn(16, 3, 8, 8), qlab.presets.w8a8(per_channel=True))
    sim["1"].output.bits = 3
    found = diagnose(sim, "0", [4 * torch.randn(16, 3, 8, 8)])
    assert found.layers == ("0", "1")
    assert "ReLU6 range" in found.cause


def test_clipped_tails_are_named_and_data_beyond_calibration():
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    sim = sim_of(nn.Sequential(nn.Linear(8, 8)), x)
    sim["0"].output.set_range(-0.2, 0.2)
    found = diagnose(sim, "0", [x])
    assert found.causes[0][0] == "output clipping"
    assert "clipped tails" in found.cause
    wild = sim_of(nn.Sequential(nn.Linear(8, 8)), 0.1 * x)
    wild["input"].output.enabled = False
    assert "beyond all that calibration saw" in diagnose(wild, "0", [10 * x]).cause


def test_what_was_inherited_is_traced_to_the_layer_that_matters():
    sim = calibrated(qlab.presets.w8a8())
    sim["stem.0"].weight.bits = 2
    found = diagnose(sim, "head", data())
    assert found.causes[0][0] == "inherited"
    assert "with 'stem.0' in float" in found.cause


def test_a_fix_gains_what_it_said_and_the_sim_was_left_alone():
    sim = calibrated(qlab.presets.w4a4())
    sim["stem.0"].weight.bits = 2
    before = sim.to_pandas()
    many = data(batches=8, size=40)
    score = qlab.SQNR(many)
    base = float(sim.evaluate(score))
    found = diagnose(sim, "stem.0", many)
    assert sim.to_pandas().equals(before)
    assert len(found.fixes) >= 2
    gains = [fix.predicted_gain for fix in found.fixes]
    assert gains == sorted(gains, reverse=True)
    for fix in found.fixes:
        twin = copy.deepcopy(sim)
        fix.apply(twin, many)
        assert float(twin.evaluate(score)) - base == pytest.approx(fix.predicted_gain, abs=0.02), fix.label
        assert fix.gain_error < fix.predicted_gain


def test_equalization_is_offered_where_it_heals_and_can_be_done():
    images = digits()
    sim = qlab.QuantSim(rescale(mobilenet(), (0.05, 20.0), fold=True), images.test_images[:2])
    sim.calibrate(images.calibration(2))
    batches = images.calibration(2)
    found = diagnose(sim, "blocks.1.depthwise.conv", batches)
    best = found.fixes[0]
    assert (best.verb, best.arguments["technique"]) == ("run", "CrossLayerEqualization")
    assert best.predicted_gain > 10
    base = float(sim.evaluate(qlab.SQNR(batches)))
    best.apply(sim, batches)
    assert sim.evaluate(qlab.Agreement(batches)) > 0.95
    assert base < 10


def test_a_fix_is_data_that_a_lab_journals_and_can_undo():
    sim = calibrated(qlab.presets.w4a4())
    fix = next(fix for fix in diagnose(sim, "head", data()).fixes if "bits" in fix.arguments)
    lab = qlab.Lab(sim, data())
    before = sim["head"].weight.bits, sim["head"].output.bits
    fix.perform(lab)
    assert (sim["head"].weight.bits, sim["head"].output.bits) != before
    assert lab.history.verb.tolist()[-1] == "set"
    lab.undo()
    assert (sim["head"].weight.bits, sim["head"].output.bits) == before


def test_what_cannot_be_diagnosed_is_said():
    sim = calibrated()
    with pytest.raises(UnknownLayer, match="Did you mean 'head'"):
        diagnose(sim, "haed", data())
    with pytest.raises(InputError, match="at least one batch"):
        diagnose(sim, "head", [])
    with pytest.raises(NotCalibrated):
        diagnose(qlab.QuantSim(branches(), data()[0][0]), "head", data())
    skipped = qlab.QuantSim(branches(), data()[0][0], qlab.presets.w8a8(skip=["head"]))
    skipped.calibrate(data())
    with pytest.raises(InputError, match="nothing of layer 'head' is quantized"):
        diagnose(skipped, "head", data())


def test_a_layer_without_loss_has_nothing_to_tell():
    sim = calibrated()
    for quantizer in sim.quantizers.values():
        quantizer.enabled = False
    sim["head"].output.enabled = True
    found = diagnose(sim, "stem.0", data())
    assert found.causes == ()
    assert found.fixes == ()
    assert found.sqnr == math.inf


def test_an_analysis_diagnoses_its_own_sim_and_shows_it_escaped():
    analysis = qlab.QuantAnalyzer(estimate=False).measure(calibrated(qlab.presets.w4a4()), data())
    found = analysis.diagnose("left")
    assert found.layer == "left"
    assert "dB" in repr(found)
    assert "<table" in found._repr_html_()
    assert len(found.table) == len(found.fixes)
