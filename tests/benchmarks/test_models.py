"""The benchmark networks are the published ones: their parameters are counted and their statistics fit."""

import pytest
import torch
from torch import nn

from benchmarks import models


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (models.resnet18, 11_689_512),  # the four counts that torchvision documents
        (models.resnet50, 25_557_032),
        (models.mobilenet_v2, 3_504_872),
        (models.vit_b_16, 86_567_656),
        (models.bert_base_encoder, 12 * (4 * (768**2 + 768) + 2 * 4 * 768**2 + 5 * 768 + 4 * 768)),
    ],
)
def test_number_of_parameters_is_the_published_one(build, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in build().parameters()) == parameters


def test_warming_up_gives_batch_norm_statistics_of_what_it_saw():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    warm = models.warmed_up(model, (64, 3, 8, 8), passes=4)
    weight = model[0].weight.flatten(1)
    # The noise has mean 0 and variance 1 in each channel, so a 1x1 convolution's outputs have these moments.
    torch.testing.assert_close(warm[1].running_mean, model[0].bias, atol=0.03, rtol=0)
    torch.testing.assert_close(warm[1].running_var, weight.square().sum(1), atol=0, rtol=0.05)
    assert not warm.training
    assert model.training
