"""Quantizers: settings follow from statistics without data, weights are kept up with, errors say what to do."""

import copy

import pytest
import torch
from torch import nn

from qlab.errors import NotCalibrated, SpecError
from qlab.quantization import Encoding, Quantizer, QuantSpec, Statistics, WeightQuantizer, fake_quantize, find_encoding


def calibrated(spec: QuantSpec | None = None) -> tuple[Quantizer, torch.Tensor]:
    torch.manual_seed(0)
    quantizer = Quantizer(spec or QuantSpec(), "layer", axis=1)
    x = torch.randn(8, 6, 10) * torch.tensor([0.1, 1, 2, 3, 4, 5])[:, None]
    quantizer.observe(x)
    quantizer.refresh()
    return quantizer, x


@pytest.mark.parametrize(
    "change",
    [{"bits": 4}, {"rule": "mse"}, {"rule": "entropy"}, {"scheme": "symmetric"}, {"bits": 3, "rule": "percentile(99)"}],
)
def test_a_changed_setting_equals_calibrating_with_it(change):
    quantizer, x = calibrated()
    quantizer.set(**change)
    fresh, _ = calibrated(QuantSpec(**change))
    assert quantizer.encoding.equals(fresh.encoding)
    assert torch.equal(quantizer(x), fresh(x))


def test_the_version_grows_with_every_change_and_only_then():
    quantizer, _ = calibrated()
    version = quantizer.version
    quantizer.bits = 8
    quantizer.enabled = True
    assert quantizer.version == version
    for change in ({"bits": 4}, {"enabled": False}, {"rule": "mse"}):
        quantizer.set(**change)
        assert quantizer.version > version
        version = quantizer.version


def test_a_refused_setting_changes_nothing():
    quantizer, _ = calibrated()
    before = quantizer.encoding
    for bad in (
        {"bits": 1},
        {"bits": 17},
        {"bits": 4.5},
        {"rule": "guess"},
        {"scheme": "odd"},
        {"granularity": "per_block(4)"},
    ):
        with pytest.raises(SpecError):
            quantizer.set(**bad)
    with pytest.raises(SpecError, match="not settings"):
        quantizer.set(bit=4)
    assert quantizer.spec == QuantSpec()
    assert quantizer.encoding.equals(before)


def test_an_uncalibrated_quantizer_says_what_to_run():
    with pytest.raises(NotCalibrated, match=r"sim\.calibrate"):
        Quantizer(QuantSpec(), "fc")(torch.randn(3))


def test_a_known_range_needs_no_data():
    quantizer = Quantizer(QuantSpec(known_range=(0, 1)), "softmax")
    assert float(quantizer.encoding.maximum) == pytest.approx(1.0)


def test_per_channel_min_max_needs_no_second_calibration_and_other_rules_say_so():
    quantizer, x = calibrated()
    quantizer.granularity = "per_channel"
    want = (x.amax((0, 2)).clamp(min=0) - x.amin((0, 2)).clamp(max=0)) / 255
    assert torch.allclose(quantizer.encoding.scale, want)
    with pytest.raises(NotCalibrated, match="per channel"):
        quantizer.rule = "mse"
    assert str(quantizer.rule) == "min_max"


def test_a_frozen_encoding_survives_calibration_but_not_a_new_setting():
    quantizer, x = calibrated()
    quantizer.set_range(-1.0, 1.0)
    quantizer.adopt(Statistics())
    assert float(quantizer.encoding.maximum) == pytest.approx(1.0, abs=0.01)
    quantizer.observe(x)
    quantizer.bits = 4
    assert float(quantizer.encoding.maximum) > 2


def linear_weight(**spec) -> tuple[nn.Linear, WeightQuantizer]:
    torch.manual_seed(0)
    linear = nn.Linear(10, 6)
    return linear, WeightQuantizer(QuantSpec(4, "symmetric", **spec), "fc", linear, "weight")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_block(4)"])
def test_a_weight_is_quantized_once_and_again_when_it_changes(granularity):
    linear, quantizer = linear_weight(granularity=granularity)
    with torch.no_grad():
        first = quantizer.quantized()
        assert quantizer.quantized() is first
        linear.weight.mul_(2)
        second = quantizer.quantized()
    assert torch.allclose(second, 2 * first, rtol=1e-5)
    assert torch.equal(second, fake_quantize(linear.weight.detach(), quantizer.encoding))


def test_blocks_cover_input_channels_and_the_last_may_be_shorter():
    linear, quantizer = linear_weight(granularity="per_block(4)")
    assert quantizer.encoding.scale.shape == (6, 3)
    alone = find_encoding_of(linear.weight[2, 8:10])
    assert float(quantizer.encoding.scale[2, 2]) == pytest.approx(float(alone.scale))


def find_encoding_of(values: torch.Tensor) -> Encoding:
    statistics = Statistics()
    statistics.update(values)
    return find_encoding(statistics.sample(), QuantSpec(4, "symmetric"))


def test_rounding_counts_only_for_the_weight_and_grid_it_was_chosen_for():
    linear, quantizer = linear_weight()
    codes = torch.full((6, 10), 3, dtype=torch.int32)
    quantizer.set_rounding(codes)
    with torch.no_grad():
        assert torch.allclose(quantizer.quantized(), 3 * quantizer.encoding.scale.expand(6, 10))
        linear.weight.mul_(2)
        assert quantizer.rounding is None
        assert quantizer.rounding_is_stale
    with pytest.raises(SpecError, match=r"\[-8, 7\]"):
        quantizer.set_rounding(codes + 9)


def test_zeros_and_infinite_weights_have_a_defined_result():
    linear, quantizer = linear_weight()
    with torch.no_grad():
        linear.weight.zero_()
        assert torch.equal(quantizer.quantized(), torch.zeros(6, 10))
        linear.weight[0, 0] = float("inf")
        with pytest.raises(SpecError, match="NaN or infinity"):
            quantizer.quantized()


def test_a_deep_copy_belongs_to_the_copied_weight_and_keeps_its_rounding():
    linear, quantizer = linear_weight()
    quantizer.set_rounding(torch.ones(6, 10))
    twin_linear, twin = copy.deepcopy(nn.ModuleList([linear, quantizer]))
    assert twin.owner is twin_linear
    assert torch.equal(twin.rounding, quantizer.rounding)


def test_state_dict_round_trip_into_an_uncalibrated_quantizer():
    quantizer, x = calibrated(QuantSpec(5))
    twin = Quantizer(QuantSpec(5), "layer", axis=1)
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin(x), quantizer(x))


def test_half_precision_of_the_model_does_not_round_the_grid():
    quantizer, _ = calibrated()
    scale = quantizer.scale.clone()
    quantizer.half()
    assert torch.equal(quantizer.scale, scale)


def changed_weight() -> tuple[WeightQuantizer, nn.Linear]:
    linear = nn.Linear(4, 3)
    quantizer = WeightQuantizer(QuantSpec(8, "symmetric"), "fc", linear, "weight")
    _ = quantizer.encoding
    with torch.no_grad():
        linear.weight.mul_(2)
    return quantizer, linear


def test_freezing_holds_the_grid_of_the_weight_as_it_is_and_not_as_it_was_last_looked_at():
    quantizer, linear = changed_weight()
    quantizer.frozen = True
    fresh = WeightQuantizer(QuantSpec(8, "symmetric"), "fc", linear, "weight")
    assert quantizer.encoding.equals(fresh.encoding)
    other, linear = changed_weight()
    other.freeze()
    fresh = WeightQuantizer(QuantSpec(8, "symmetric"), "fc", linear, "weight")
    assert other.encoding.equals(fresh.encoding)


def test_an_encoding_given_to_a_changed_weight_is_not_overwritten():
    given = Encoding(torch.tensor(0.25), torch.tensor(0.0), -8, 7)
    quantizer, linear = changed_weight()
    quantizer.encoding = given
    assert quantizer.encoding.equals(given)
    frozen, linear = changed_weight()
    frozen.freeze(given)
    assert frozen.encoding.equals(given)
    with torch.no_grad():
        linear.weight.mul_(2)
    assert frozen.encoding.equals(given)


def test_a_misspelt_setting_is_refused_and_names_the_nearest():
    quantizer = Quantizer(QuantSpec(bits=8), "layer")
    with pytest.raises(SpecError, match=r"no setting 'bit'\. Did you mean 'bits'"):
        quantizer.bit = 4
    with pytest.raises(SpecError, match="'symmetric'"):
        WeightQuantizer(QuantSpec(bits=8), "layer", nn.Linear(2, 2), "weight").symmetric = True
