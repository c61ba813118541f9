"""Folding keeps the float function, goes where it is exact, says why elsewhere, and takes learned grids along."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.quantization import quantize
from qlab.sim import Role
from qlab.techniques import Report
from tests.techniques.models import NETWORKS, calibrated, images, lived, relative


def reasons(report: Report) -> dict[str, str]:
    return {row["layer"]: row["reason"] for row in report.rows if not row["into"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_layer_takes_its_batch_norm_and_a_file_holds_the_result(name, tmp_path):
    make, shape = NETWORKS[name]
    model, x = lived(make()), torch.randn(4, *shape)
    sim = calibrated(model, x)
    with torch.no_grad():
        want = model(x)
    report = qlab.BatchNormFolding().apply(sim, [x])
    assert reasons(report) == {}
    assert not any(layer.kind == "batch_norm" for layer in sim.graph)
    assert relative(sim.float_output(x), want) < 1e-5
    assert report.values["float_change_relative"] < 1e-5
    assert torch.isfinite(sim.output(x)).all()
    sim.save(tmp_path / "sim.safetensors")
    loaded = qlab.load(tmp_path / "sim.safetensors", model, x)
    assert torch.equal(loaded.output(x), sim.output(x))
    assert torch.equal(loaded.float_output(x), sim.float_output(x))
    assert loaded.graph.folded.keys() == sim.graph.folded.keys()


def test_moments_of_the_folded_norms_are_those_of_the_values():
    norm = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, nn.ReLU())
    x = torch.randn(64, 3, 10, 10)
    model.train()
    for _ in range(200):
        model(x)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-1, 1)
    sim = qlab.QuantSim(model, x[:2])
    qlab.BatchNormFolding().apply(sim)
    values = sim.model[0](x).detach().movedim(1, 0).flatten(1)
    assert torch.allclose(sim.graph.folded["1"].mean.float(), values.mean(1), atol=1e-2)
    assert torch.allclose(sim.graph.folded["1"].deviation.float(), values.std(1), rtol=1e-2)


class Awkward(nn.Module):
    """BatchNorms each of which has one reason not to be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.branching = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.repeated = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.after_shared = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.forgetful = nn.BatchNorm2d(4, track_running_stats=False)
        self.weight, self.after_function = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.BatchNorm2d(4)
        self.padded, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.last, self.transposed = nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2)
        self.over_time, self.linear = nn.BatchNorm1d(4), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = self.branching(y) * y
        y = self.repeated(self.repeated(self.conv2(y)) + 1)
        y = self.after_shared(self.shared(torch.sin(self.shared(y))))
        y = self.forgetful(self.conv2(y))
        y = torch.sin(self.after_function(F.conv2d(y, self.weight)))
        y = torch.sin(self.conv3(self.padded(y)))
        y = torch.sin(self.transposed(self.last(y)))
        return self.over_time(self.linear(y.flatten(2)[..., :5])).sigmoid()


def test_what_is_not_folded_is_listed_with_the_reason_and_left_alone():
    model, x = lived(Awkward()), torch.randn(4, 3, 6, 6)
    sim = calibrated(model, x)
    want, before = sim.float_output(x), {k: v.clone() for k, v in sim.state_dict().items()}
    found = reasons(report := qlab.BatchNormFolding().apply(sim))
    expected = {
        "branching": "2 layers take 'conv1'",
        "repeated": "it is called 2 times",
        "after_shared": "the weight of 'shared@1' is used 2 times",
        "forgetful": "it keeps no running statistics",
        "after_function": "'conv2d' is a function without a bias",
        "padded": "'conv3' pads with zeros",
        "last": "'transposed' pads with zeros",
        "over_time": "'linear' has its channels on another axis",
    }
    assert report.summary == "folded 0 of 9 BatchNorms"
    assert found.keys() == {*expected, "repeated@1"}
    for name, reason in expected.items():
        assert reason in found[name], name
    assert torch.equal(sim.float_output(x), want)
    assert all(torch.equal(v, before[k]) for k, v in sim.state_dict().items())


def test_a_norm_in_training_mode_is_not_folded():
    x = torch.randn(4, 3, 8, 8)
    sim = qlab.QuantSim(lived(images()), x)
    sim.train()
    found = reasons(qlab.BatchNormFolding().apply(sim))
    assert len(found) == 5
    assert all("training mode" in reason for reason in found.values())
    sim.eval()
    assert reasons(qlab.BatchNormFolding().apply(sim)) == {}


class Forward(nn.Module):
    """BatchNorms without a layer before them that could take them; the layer after each can, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")
        self.norm3, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm4, self.linear = nn.BatchNorm2d(4), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(self.conv1(self.norm1(x)))
        x = torch.sin(self.conv2(self.norm2(x)))
        x = torch.sin(self.conv3(self.norm3(x)))
        return self.linear(self.norm4(x).flatten(1))


def test_forward_folding_is_exact_and_the_place_of_the_norm_takes_the_ranges_of_its_input():
    model, x = lived(Forward()), torch.randn(8, 3, 8, 8)
    with torch.no_grad():  # without a shift zeros stay zeros, so padding does no harm
        model.norm3.bias.copy_(model.norm3.running_mean * model.norm3.weight)
        model.norm3.bias.div_((model.norm3.running_var + model.norm3.eps).sqrt())
        model.norm3.running_mean.zero_()
        model.norm3.bias.zero_()
    sim = calibrated(model, x)
    want = sim.float_output(x)
    report = qlab.BatchNormFolding().apply(sim)
    assert {row["layer"]: (row["direction"], row["into"]) for row in report.rows} == {
        "norm1": ("forward", "conv1"),
        "norm2": ("forward", "conv2"),
        "norm3": ("forward", "conv3"),
        "norm4": ("forward", "linear"),
    }
    assert relative(sim.float_output(x), want) < 1e-5
    assert relative(sim.output(x), want) < 0.05
    assert torch.equal(sim["norm1"].output.encoding.scale, sim["x"].output.encoding.scale)


def test_a_norm_written_as_a_function_is_fused_and_folded():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm
            return F.relu(F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, eps=1e-3))

    model, x = lived(Functional()), torch.randn(4, 3, 6, 6)
    sim = calibrated(model, x)
    assert [sim[name].role for name in ("conv", "batch_norm", "relu")] == [Role.FUSED, Role.FUSED, Role.QUANTIZED]
    want = sim.float_output(x)
    assert reasons(qlab.BatchNormFolding().apply(sim)) == {}
    assert relative(sim.float_output(x), want) < 1e-5


def test_norms_in_a_row_fold_one_after_another():
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(4, 3, 6, 6)
    sim = calibrated(model, x)
    want = sim.float_output(x)
    report = qlab.BatchNormFolding().apply(sim)
    assert reasons(report) == {}
    assert relative(sim.float_output(x), want) < 1e-5
    assert relative(sim.output(x), want) < 0.05
    assert sim.graph.folded["1"] is sim.graph.folded["2"]


def test_a_layer_with_an_own_output_quantizer_takes_over_what_the_norm_knew():
    x = torch.randn(8, 3, 8, 8)
    sim = calibrated(lived(images()), x, replace(qlab.presets.w8a8(), supergroups=()))
    want = sim.float_output(x)
    seen = sim["1"].output.statistics.maximum
    qlab.BatchNormFolding().apply(sim)
    assert torch.equal(sim["0"].output.statistics.maximum, seen)
    assert relative(sim.output(x), want) < 0.1


def fitted(granularity: str, scheme: str = "symmetric") -> tuple[qlab.QuantSim, Tensor]:
    """A sim of conv - BN with a rounding that is not to nearest, and some negative gammas."""
    x = torch.randn(4, 3, 6, 6)
    sim = calibrated(lived(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), seed=1), x)
    weight = sim["0"].weight
    weight.set(granularity=granularity, scheme=scheme, bits=4)
    encoding = weight.required_encoding()
    codes = quantize(weight.weight, encoding) + torch.randint(0, 2, weight.weight.shape)
    weight.set_rounding(codes.clamp(encoding.qmin + 1, encoding.qmax))
    return sim, x


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_a_learned_rounding_per_channel_goes_along_exactly(scheme):
    sim, x = fitted("per_channel", scheme)
    norm = sim.model[1]
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().view(-1, 1, 1, 1)
    assert (factor < 0).any()
    want, before = sim["0"].weight.quantized() * factor, sim.output(x)
    report = qlab.BatchNormFolding().apply(sim)
    assert report.rows[0]["grid"] == "kept"
    assert sim["0"].weight.rounding is not None
    assert torch.allclose(sim["0"].weight.quantized(), want, rtol=1e-5, atol=1e-7)
    assert relative(sim.output(x), before) < 1e-3  # rounding of outputs at half points may fall either way


def test_a_learned_rounding_on_one_grid_cannot_go_along_and_that_is_said():
    sim, _ = fitted("per_tensor")
    report = qlab.BatchNormFolding().apply(sim)
    assert report.rows[0]["grid"] == "found"
    assert "the rounding chosen for it had to go" in report.notes[0]
    weight = sim["0"].weight
    assert weight.rounding is None
    assert not weight.frozen
    assert not weight.rounding_is_stale
    largest = weight.weight.abs().max()
    assert weight.required_encoding().scale * 8 >= largest


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block(2)"])
def test_keeping_integers_keeps_what_the_sim_computes(granularity):
    x = torch.randn(16, 3, 8, 8)
    sim = calibrated(lived(images()), x, qlab.presets.w4a8())
    sim.configure("*", weight={"granularity": granularity, "scheme": "strict_symmetric"})
    if granularity == "per_channel":  # one grid for several groups of a transposed convolution takes no own factors
        sim["10"].weight.granularity = "per_tensor"
    before = sim.output(x)
    report = qlab.BatchNormFolding(keep_integers=True).apply(sim)
    rows = {row["layer"]: row["grid"] for row in report.rows}
    assert rows.pop("11") == "found"
    assert "its integers had to go" in report.notes[0]
    assert set(rows.values()) == {"kept"}
    assert str(sim["0"].weight.granularity) == (granularity if "block" in granularity else "per_channel")
    coarse = relative(before, sim.float_output(x))
    assert relative(sim.output(x), before) < 0.5 * coarse
    sim, x = fitted(granularity)
    before = sim.output(x)
    qlab.BatchNormFolding(keep_integers=True).apply(sim)
    assert relative(sim.output(x), before) < 1e-3


def test_the_lowest_integer_has_no_opposite_and_its_step_is_reported():
    sim, _ = fitted("per_channel")
    codes = torch.full(sim["0"].weight.weight.shape, -8)
    sim["0"].weight.set_rounding(codes)
    report = qlab.BatchNormFolding().apply(sim)
    negative = int(sim.graph.folded["1"].deviation.numel() - (sim["0"].weight.rounding[:, 0, 0, 0] == -8).sum())
    assert negative > 0
    assert f"{negative * 27} of its integers moved by one step" in report.notes[0]


def test_a_bias_correction_takes_the_factor_too():
    sim, x = fitted("per_channel")
    sim["0"].weight.set_bias_correction(torch.randn(8))
    before = sim.output(x)
    qlab.BatchNormFolding().apply(sim)
    assert relative(sim.output(x), before) < 1e-3


def test_a_model_without_batch_norm_gets_a_report_and_folding_twice_finds_nothing():
    x = torch.randn(4, 3, 8, 8)
    sim = qlab.QuantSim(lived(images()), x)
    qlab.BatchNormFolding().apply(sim)
    before = copy.deepcopy(sim.state_dict())
    report = qlab.BatchNormFolding().apply(sim)
    assert report.summary == "the model has no BatchNorm: nothing to fold"
    assert all(torch.equal(v, before[k]) for k, v in sim.state_dict().items())


def test_a_gamma_of_zero_leaves_the_shift_alone():
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight[1] = 0
    x = torch.randn(4, 3, 6, 6)
    for granularity in ("per_tensor", "per_channel"):
        sim = calibrated(model, x, qlab.presets.w8a8(per_channel=granularity == "per_channel"))
        want = sim.float_output(x)
        qlab.BatchNormFolding(keep_integers=True).apply(sim)
        assert relative(sim.float_output(x), want) < 1e-5
        assert relative(sim.output(x), want) < 0.05
        assert not sim["0"].weight.quantized()[1].any()


def test_every_batch_norm_of_a_residual_network_is_folded():
    digits = qlab.examples.digits()
    sim = qlab.QuantSim(qlab.examples.resnet(), digits.train_images[:2])
    report = qlab.BatchNormFolding().apply(sim, digits.calibration(1))
    assert (report.values["folded"], report.values["left"]) == (21, 0)
    assert report.values["float_change_relative"] < 1e-5
