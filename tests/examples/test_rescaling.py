"""Rescaling keeps the float function and spreads the weights."""

import pytest
import torch
from torch import nn

import qlab.examples
from qlab.examples import rescale

IMAGES = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
THREE_ORDERS = (10**-1.5, 10**1.5)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y - reference).norm() / reference.norm()).item()


def channel_spread(weight: torch.Tensor, dim: int) -> float:
    """Largest over smallest of the channels' largest absolute weights."""
    largest = weight.abs().amax(dim=[d for d in range(weight.dim()) if d != dim])
    return (largest.max() / largest.min()).item()


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("build", [qlab.examples.mobilenet, qlab.examples.resnet])
def test_the_float_function_stays(build, fold):
    model = build().double()
    rescaled = rescale(model, spread=THREE_ORDERS, fold=fold)
    assert relative_error(rescaled(IMAGES.double()), model(IMAGES.double())) < 1e-6


@pytest.mark.parametrize("build", [qlab.examples.mobilenet, qlab.examples.resnet])
def test_the_model_given_is_left_alone(build):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rescale(model, fold=True)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_folded_weights_spread_over_output_and_input_channels():
    model = rescale(qlab.examples.resnet(), spread=(1.0, 1.0), fold=True)
    rescaled = rescale(qlab.examples.resnet(), spread=THREE_ORDERS, fold=True)
    first, second = "layer2.1.conv1", "layer2.1.conv2"
    for name, dim in ((first, 0), (second, 1)):
        before = channel_spread(model.get_submodule(name).weight, dim)
        assert channel_spread(rescaled.get_submodule(name).weight, dim) > 10 * before


def test_every_batch_norm_after_a_convolution_is_folded():
    rescaled = rescale(qlab.examples.mobilenet(), fold=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in rescaled.modules())
    assert rescaled.get_submodule("blocks.0.depthwise.conv").bias is not None


def test_factors_lie_in_the_spread_and_follow_the_seed():
    model = nn.Sequential(nn.Linear(3, 200, bias=False), nn.ReLU(), nn.Linear(200, 3))
    factors = (rescale(model, spread=(0.25, 4.0))[0].weight / model[0].weight)[:, 0]
    assert factors.min() >= 0.25 * (1 - 1e-5)
    assert factors.max() <= 4.0 * (1 + 1e-5)
    assert factors.log().mean().abs() < 0.2  # log-uniform: as many channels shrink as grow
    assert torch.equal(rescale(model, seed=1)[0].weight, rescale(model, seed=1)[0].weight)
    assert not torch.equal(rescale(model, seed=1)[0].weight, rescale(model, seed=2)[0].weight)


def test_grouped_convolutions_keep_the_float_function():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.ReLU(inplace=True),
    ).double()
    model(torch.randn(8, 4, 9, 9).double())
    images = torch.randn(2, 4, 9, 9).double()
    rescaled = rescale(model)
    assert not torch.equal(rescaled[3].weight, model[3].weight)
    assert relative_error(rescaled(images), model.eval()(images)) < 1e-6


def accuracy_with_8_bit_weights(model: nn.Module, digits: qlab.examples.Digits) -> float:
    """Share of right answers when every weight is rounded to one 8-bit symmetric grid."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                scale = module.weight.abs().max() / 127
                module.weight.copy_((module.weight / scale).round() * scale)
        answers = model(digits.test_images).argmax(1)
    return (answers == digits.test_labels).float().mean().item()


@pytest.mark.parametrize("build", [qlab.examples.mobilenet, qlab.examples.resnet])
def test_three_orders_of_magnitude_take_per_tensor_weights_to_chance(build):
    digits = qlab.examples.digits()
    assert accuracy_with_8_bit_weights(rescale(build(), spread=(1.0, 1.0), fold=True), digits) > 0.97
    assert accuracy_with_8_bit_weights(rescale(build(), spread=THREE_ORDERS, fold=True), digits) < 0.25


class Branching(nn.Module):
    """The first layer's output is read twice, so no factor on it can be undone in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(hidden) + hidden


class Repeating(nn.Module):
    """The second layer is called twice, so its inputs have two origins."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize(
    "model", [Branching(), Repeating(), nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))]
)
def test_a_model_where_factors_would_show_is_refused(model):
    with pytest.raises(ValueError, match="nothing to rescale"):
        rescale(model)


@pytest.mark.parametrize("spread", [(0.0, 4.0), (4.0, 0.25), (-1.0, 1.0)])
def test_a_spread_that_is_no_range_is_refused(spread):
    with pytest.raises(ValueError, match="two positive numbers"):
        rescale(nn.Linear(2, 2), spread=spread)
