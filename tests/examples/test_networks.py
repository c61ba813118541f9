"""The committed weights are small, load without pickle, and score what the documentation says."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qlab.examples
from qlab.examples.weights import FOLDER

NETWORKS = [qlab.examples.mobilenet, qlab.examples.resnet, qlab.examples.vit]


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (qlab.examples.mobilenet, 68_442),
        (qlab.examples.resnet, 68_642),
        (qlab.examples.vit, 89_386),
        (qlab.examples.char_gpt, 826_465),
    ],
)
def test_number_of_parameters_is_the_documented_one(build: Callable[..., nn.Module], parameters: int):
    assert sum(parameter.numel() for parameter in build().parameters()) == parameters
    assert f"{parameters:,}" in build.__doc__


@pytest.mark.parametrize("build", NETWORKS)
def test_pretrained_networks_come_in_eval_mode_and_twice_the_same(build: Callable[..., nn.Module]):
    images = torch.randn(2, 1, 32, 32)
    first, second = build(), build()
    assert not any(module.training for module in first.modules())
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize(
    ("build", "accuracy"),
    [(qlab.examples.mobilenet, 0.985), (qlab.examples.resnet, 0.988), (qlab.examples.vit, 0.970)],
)
def test_score_on_the_test_images_is_the_documented_one(build: Callable[..., nn.Module], accuracy: float):
    digits = qlab.examples.digits()
    with torch.no_grad():
        answers = build()(digits.test_images).argmax(1)
    right = (answers == digits.test_labels).float().mean().item()
    # Two images of 597: other CPUs round differently, and no more than that.
    assert right == pytest.approx(accuracy, abs=2 / 597)


def test_weights_are_under_one_megabyte_together():
    assert 0 < sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 1_000_000


def test_batch_norm_statistics_are_those_of_the_data():
    """A network whose statistics did not fit its data would misjudge ranges."""
    model = qlab.examples.resnet()
    before = model.bn1.running_mean.clone()
    images = torch.cat([images for images, _ in qlab.examples.digits().train])
    seen = model.conv1(images).mean(dim=(0, 2, 3))
    assert (seen - before).abs().max() < 0.2 * model.bn1.running_var.sqrt().max()
