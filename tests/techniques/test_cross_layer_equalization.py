"""Equalization keeps the float function, makes ranges equal, and leaves alone what a factor would change."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlab
from qlab.errors import NotCalibrated
from qlab.quantization import quantize
from tests.techniques.models import NETWORKS, calibrated, images, lived, relative


def spread(model: nn.Module, orders: float = 2.0) -> nn.Module:
    """Weights whose output channels differ by powers of ten, so that there is something to equalize."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                shape = (-1, *[1] * (module.weight.dim() - 1))
                factors = 10 ** (orders * (torch.rand(module.weight.shape[0], generator=generator) - 0.5))
                module.weight.mul_(factors.view(shape))
    return model


def output_ranges(module: nn.Module) -> Tensor:
    return module.weight.detach().abs().flatten(1).amax(1)


def input_ranges(module: nn.Module) -> Tensor:
    return module.weight.detach().abs().transpose(0, 1).flatten(1).amax(1)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_function_stays_through_every_kind_of_layer(name, tmp_path):
    make, shape = NETWORKS[name]
    model, x = spread(lived(make())), torch.randn(4, *shape)
    sim = calibrated(model, x)
    with torch.no_grad():
        want = model(x)
    report = qlab.CrossLayerEqualization(absorb_bias=False).apply(sim, [x])
    assert {row["layer"]: row["with"] for row in report.rows} == {
        "images": {"0": "3", "3": "6", "6": "10", "10": "16", "16": "19"},
        "sequences": {"0": "3", "3": "6"},
        "volumes": {"0": "3", "3": "8"},
    }[name]
    assert all(row["largest_factor"] > 1.1 for row in report.rows)
    assert relative(sim.float_output(x), want) < 1e-5
    for row in report.rows:  # once every factor has settled, both sides of a pair have the same ranges
        assert row["outputs_after"] == pytest.approx(row["inputs_after"], rel=1e-2)
    assert relative(sim.output(x), want) < 0.05
    sim.save(tmp_path / "sim.safetensors")
    assert torch.equal(qlab.load(tmp_path / "sim.safetensors", model, x).output(x), sim.output(x))


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_keep_their_float_function(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    layers, channels = [], 4
    for _ in range(pick(2, 3, 4)):
        groups = pick(1, 2, channels)
        outputs = channels * pick(1, 2) if groups == channels else pick(4, 8)
        kind = pick(nn.Conv2d, nn.ConvTranspose2d)
        layers += [kind(channels, outputs, 3, padding=1, groups=groups, bias=pick(True, False))]
        layers += [nn.BatchNorm2d(outputs)] if pick(True, False) else []
        layers += [pick(nn.ReLU(), nn.PReLU(), nn.LeakyReLU(), nn.Identity(), nn.Dropout(0.5))]
        layers += [pick(nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Upsample(size=7, mode="bilinear"))]
        channels = outputs
    layers += [nn.Flatten(), nn.Linear(channels * 49, 6), nn.ReLU(), nn.Linear(6, 3)]
    model, x = spread(lived(nn.Sequential(*layers), seed)), torch.randn(4, 4, 7, 7)
    sim = qlab.QuantSim(model, x)
    report = qlab.CrossLayerEqualization(absorb_bias=False).apply(sim, [x])
    convolutions = sum(isinstance(layer, nn.modules.conv._ConvNd) for layer in layers)
    assert report.values["pairs"] == convolutions + 1
    assert report.values["float_change_relative"] < 1e-5
    with torch.no_grad():
        assert relative(sim.float_output(x), model(x)) < 1e-5


def test_a_pair_gets_the_square_root_of_its_ranges():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -8.0], [1.0, 0.5], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([2.0, 2.0, 2.0]))
        model[2].weight.copy_(torch.tensor([[0.5, 4.0, 1.0], [-0.25, 1.0, 1.0]]))
    sim = qlab.QuantSim(model, torch.randn(2, 2))
    qlab.CrossLayerEqualization().apply(sim)
    # ranges 8 and 0.5: s = 4; 1 and 4: s = 1/2; a dead channel keeps 1
    assert torch.allclose(sim.model[0].weight, torch.tensor([[1.0, -2.0], [2.0, 1.0], [0.0, 0.0]]))
    assert torch.allclose(sim.model[0].bias, torch.tensor([0.5, 4.0, 2.0]))
    assert torch.allclose(sim.model[2].weight, torch.tensor([[2.0, 2.0, 1.0], [-1.0, 0.5, 1.0]]))


def test_through_a_depthwise_layer_all_three_ranges_become_their_geometric_mean():
    layers = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)
    model = spread(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]))
    want = (output_ranges(layers[0]) * output_ranges(layers[1]) * input_ranges(layers[2])) ** (1 / 3)
    sim = qlab.QuantSim(model, torch.randn(2, 2, 5, 5))
    report = qlab.CrossLayerEqualization().apply(sim)
    for ranges in (output_ranges(sim.model[0]), output_ranges(sim.model[2]), input_ranges(sim.model[4])):
        assert torch.allclose(ranges, want, rtol=1e-5)
    assert report.values["sweeps"] == 2  # the second one finds nothing to do


def test_a_long_chain_is_swept_until_the_ranges_of_every_pair_are_equal():
    torch.manual_seed(3)
    layers = [layer for i in range(5) for layer in (nn.Linear(6, 6), nn.ReLU())]
    sim = qlab.QuantSim(spread(nn.Sequential(*layers), 4.0), torch.randn(2, 6))
    report = qlab.CrossLayerEqualization().apply(sim)
    assert 2 < report.values["sweeps"] < 100
    for i in range(0, 8, 2):
        assert torch.allclose(output_ranges(sim.model[i]), input_ranges(sim.model[i + 2]), rtol=1e-3)
    again = qlab.CrossLayerEqualization().apply(sim)
    assert again.values["moved"] == 0
    assert "were equal already" in again.summary


class Entangled(nn.Module):
    """Kernels whose outputs are needed elsewhere, or pass something that no factor passes."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("residual", "shown", "gelu", "normed", "repeated", "shuffled", "channels", "time"):
            setattr(self, name, nn.Conv2d(4, 4, 1))
        self.norm, self.shuffle = nn.GroupNorm(2, 4), nn.ChannelShuffle(2)
        self.linear, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.residual(x))
        shown = F.relu(self.shown(x) + x)
        y = self.normed(F.gelu(self.gelu(shown)))
        y = self.repeated(torch.sin(self.repeated(F.relu(self.norm(y)))))
        y = self.channels(self.shuffle(self.shuffled(F.hardtanh(y, -1, 1))))
        y = self.time(F.pad(y, (1, 1), value=1.0))[..., 1:-1]
        return self.last(F.relu(self.linear(y.transpose(1, 2)))), shown


def test_what_is_needed_elsewhere_is_left_alone_with_the_reason():
    model, x = Entangled().eval(), torch.randn(3, 4, 5, 5)
    sim = calibrated(model, x)
    want = sim.float_output(x)
    report = qlab.CrossLayerEqualization().apply(sim, [x])
    assert [(row["layer"], row["with"]) for row in report.rows] == [("linear", "last")]
    told = report.notes[-1]
    for reason in (
        "residual: 2 layers take 'relu'",
        "shown: 'add' (add) follows",
        "gelu: 'gelu_1' (gelu) follows",
        "normed: 'norm' (GroupNorm) follows",
        "repeated: the weight of 'repeated' is used 2 times",
        "shuffled: 'shuffle' (ChannelShuffle) follows",
        "channels: 'pad' (pad) follows",
    ):
        assert reason in told
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(sim.float_output(x), want, strict=True))


def test_a_model_without_any_pair_gets_a_report():
    sim = qlab.QuantSim(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), torch.randn(2, 4))
    before = {k: v.clone() for k, v in sim.state_dict().items()}
    report = qlab.CrossLayerEqualization().apply(sim)
    assert report.summary == "no two layers to equalize"
    assert report.rows == ()
    assert all(torch.equal(v, before[k]) for k, v in sim.state_dict().items())


def test_without_folding_a_batch_norm_keeps_layers_apart():
    sim = qlab.QuantSim(lived(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))), torch.randn(3, 4))
    report = qlab.CrossLayerEqualization(fold=False).apply(sim)
    assert report.summary == "no two layers to equalize"
    assert "0: '1' (BatchNorm1d) follows" in report.notes[-1]
    assert qlab.CrossLayerEqualization().apply(sim).values["pairs"] == 1


def relu6() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 1), nn.Hardtanh(0, 2), nn.Conv2d(6, 4, 1), nn.ReLU6()
    )


def test_relu6_keeps_layers_apart_until_it_is_replaced_on_request():
    model, x = spread(relu6(), 1.0), torch.randn(4, 3, 8, 8) * 5
    sim = calibrated(model, x)
    want = sim.float_output(x)
    report = qlab.CrossLayerEqualization().apply(sim, [x])
    assert report.summary == "no two layers to equalize"
    assert "2 pairs are kept apart by ReLU6" in report.notes[0]
    assert torch.equal(sim.float_output(x), want)
    report = qlab.CrossLayerEqualization(replace_relu6=True).apply(sim, [x])
    assert [layer.kind for layer in sim.graph] == ["input", "conv", "relu", "conv", "relu", "conv", "relu6"]
    moved = relative(sim.float_output(x), want)
    assert moved > 1e-3  # the bounds did cut something
    assert report.values["float_change_relative"] == pytest.approx(moved, rel=1e-3)
    plain = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU(), model[4], nn.ReLU6())
    with torch.no_grad():
        assert relative(sim.float_output(x), plain(x)) < 1e-5
    assert relative(sim.output(x), plain(x)) < 0.05


def test_without_data_stale_ranges_are_forgotten_and_with_data_measured_again():
    model, x = spread(lived(images())), torch.randn(8, 3, 8, 8)
    sim = calibrated(model, x)
    sim["2"].output.set_range(0, 1)  # frozen by hand, for values that will be no more
    report = qlab.CrossLayerEqualization().apply(sim)
    assert any("Frozen ranges thawed, for their values have changed: 2" in note for note in report.notes)
    assert any("run sim.calibrate(batches)" in note for note in report.notes)
    assert sim["2"].output.encoding is None
    assert sim["input"].output.encoding is not None
    assert sim["19"].output.encoding is not None  # behind the last pair nothing has changed
    with pytest.raises(NotCalibrated):
        sim.output(x)
    sim.calibrate([x])
    other = calibrated(model, x)
    report = qlab.CrossLayerEqualization().apply(other, [x])
    assert "activation ranges were measured again on the batches given." in report.notes
    assert torch.equal(other.output(x), sim.output(x))


def test_a_sim_that_was_not_calibrated_stays_so_and_can_be_calibrated_afterwards():
    model, x = spread(lived(images())), torch.randn(8, 3, 8, 8)
    sim = qlab.QuantSim(model, x)
    report = qlab.CrossLayerEqualization().apply(sim)
    assert not any("calibrate" in note for note in report.notes)
    sim.calibrate([x])
    with torch.no_grad():
        assert relative(sim.output(x), model(x)) < 0.05


def two_linear(granularity: str) -> tuple[qlab.QuantSim, Tensor]:
    x = torch.randn(16, 6)
    sim = calibrated(spread(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))), x)
    for name in ("0", "2"):
        weight = sim[name].weight
        weight.set(granularity=granularity, bits=4)
        codes = quantize(weight.weight, weight.required_encoding()) + 1
        weight.set_rounding(codes.clamp(-8, 7))
    return sim, x


def test_a_learned_rounding_survives_where_the_grid_can_move_and_is_said_to_be_gone_elsewhere():
    sim, x = two_linear("per_channel")
    codes, old, weight = sim["0"].weight.rounding, sim["0"].weight.quantized(), sim.model[0].weight.detach().clone()
    report = qlab.CrossLayerEqualization().apply(sim, [x])
    assert torch.equal(sim["0"].weight.rounding, codes)
    factors = (sim.model[0].weight / weight).mean(1, keepdim=True)
    assert torch.allclose(sim["0"].weight.quantized(), old * factors, rtol=1e-5)
    assert any("'2'" in note and "the rounding chosen for it" in note for note in report.notes)
    assert sim["2"].weight.rounding is None
    assert not sim["2"].weight.frozen
    steps = sim["2"].weight.required_encoding().scale
    assert ((sim["2"].weight.quantized() - sim.model[2].weight).abs() <= steps[:, None] * 0.5001).all()


def absorbing(padding: int = 0) -> tuple[nn.Module, Tensor]:
    """Conv - BN - ReLU - conv where two channels lie far above zero, by more than 3 deviations."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=padding))
    x = torch.randn(64, 3, 8, 8)
    model.train()
    for _ in range(100):
        model(x)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([10.0, 0.0, 7.0, -4.0]))
    return model.eval(), x


def test_high_biases_are_absorbed_where_relu_lets_them_pass():
    model, x = absorbing()
    sim = calibrated(model, x)
    with torch.no_grad():
        want = model(x)
    report = qlab.CrossLayerEqualization().apply(sim, [x])
    assert report.rows[0]["absorbed"] == 2
    kept = calibrated(model, x)
    qlab.CrossLayerEqualization(absorb_bias=False).apply(kept, [x])
    assert sim["2"].output.encoding.maximum < 0.7 * kept["2"].output.encoding.maximum
    moved = relative(sim.float_output(x), want)
    assert 0 < moved < 3e-3  # of a normal distribution 0.13 % lie below 3 deviations
    assert report.values["float_change_relative"] == pytest.approx(moved, rel=1e-3)
    assert torch.allclose(
        sim.graph.folded["1"].mean, kept.graph.folded["1"].mean.minimum(3 * kept.graph.folded["1"].deviation)
    )
    with torch.no_grad():  # exact for samples of which nothing lies below the constant
        constant = (model[1].bias - 3 * model[1].weight.abs()).clamp_min(0).view(-1, 1, 1)
        above = (model[1](model[0](x)) >= constant).flatten(1).logical_or((constant == 0).expand(4, 6, 6).flatten())
        inside = x[above.all(1)]
        assert 30 < len(inside) < 64
        assert relative(sim.float_output(inside), model(inside)) < 1e-5


def test_biases_are_not_absorbed_where_the_next_layer_pads_with_zeros():
    model, x = absorbing(padding=1)
    sim = qlab.QuantSim(model, x)
    report = qlab.CrossLayerEqualization().apply(sim, [x])
    assert report.rows[0]["absorbed"] == 0
    assert any("zeros are padded" in note for note in report.notes)
    assert report.values["float_change_relative"] < 1e-5


def test_a_layer_excluded_from_quantization_is_equalized_all_the_same():
    model, x = spread(lived(images())), torch.randn(4, 3, 8, 8)
    sim = calibrated(model, x, replace(qlab.presets.w8a8(), skip=("3",)))
    report = qlab.CrossLayerEqualization(absorb_bias=False).apply(sim, [x])
    assert report.values["pairs"] == 5
    assert report.values["float_change_relative"] < 1e-5


def test_all_zero_weights_keep_their_factors():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    sim = calibrated(model, torch.randn(4, 4))
    report = qlab.CrossLayerEqualization().apply(sim)
    assert report.values["moved"] == 0
    assert not sim.model[0].weight.any()


@pytest.mark.parametrize("build", ["mobilenet", "resnet"])
def test_a_rescaled_network_comes_back_from_chance_to_its_float_accuracy(build):
    digits = qlab.examples.digits()
    model = qlab.examples.rescale(getattr(qlab.examples, build)(), spread=(10**-1.5, 10**1.5))
    sim = qlab.QuantSim(model, digits.train_images[:2], qlab.presets.w8a8())
    accuracy = qlab.Accuracy(digits.test)
    qlab.BatchNormFolding().apply(sim)
    sim.calibrate(digits.calibration(8))
    of_float, before = sim.evaluate(accuracy, quantized=False), sim.evaluate(accuracy)
    report = qlab.CrossLayerEqualization().apply(sim, digits.calibration(8))
    assert before < 0.2
    assert sim.evaluate(accuracy) > of_float - 0.005
    assert report.values["float_change_relative"] < 1e-5
