"""From the analysis to the culprit, its cause and its cure, in networks where one layer was made hard on purpose."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import qlab


def images(seed: int) -> Tensor:
    return torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def spiky(seed: int) -> Tensor:
    """Mostly small, and some pixels a thousand times as large: only a clip keeps what follows within bounds."""
    x = 0.05 * images(seed)
    return torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.0005, 1000 * x, x)


def tokens(seed: int) -> Tensor:
    return torch.randn(24, 6, 32, generator=torch.Generator().manual_seed(seed))


def an_outlier_channel() -> nn.Module:
    """Channel 17 of the second convolution is 40 times as large, and is read with a weight 40 times smaller."""
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 6, 3), nn.Flatten()
    )
    with torch.no_grad():
        for tensor in (model[2].weight, model[2].bias):
            tensor[17] *= 40
        model[4].weight[:, 17] /= 40
    return model


def a_spread_of_depthwise_channels() -> nn.Module:
    """The depthwise convolution's channels reach 1 to 480, and its inputs undo that."""
    factors = torch.logspace(0, math.log10(480), 16)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 6, 3)
    )
    with torch.no_grad():
        model[2].weight.copy_(torch.randn_like(model[2].weight).clamp(-1, 1))
        model[2].weight /= model[2].weight.abs().amax((1, 2, 3), keepdim=True)
        model[2].weight *= factors.view(-1, 1, 1, 1)
        model[2].bias.zero_()
        model[4].weight /= factors.view(1, -1, 1, 1)
    return model


def a_relu6_that_is_rarely_full() -> nn.Module:
    """A ReLU6 whose values are small but for spikes, which its grid has to hold: five bits are few for the rest."""
    return nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU6(), nn.Conv2d(16, 6, 3), nn.Flatten())


def outlier_dimensions_of_a_layer_norm() -> nn.Module:
    """Two dimensions are 60 times as large after the norm, and are read with weights as much smaller."""
    model = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 8))
    with torch.no_grad():
        model[1].weight[[3, 30]] = 60.0
        model[2].weight[:, [3, 30]] /= 60.0
    return model


CASES = [
    (an_outlier_channel, None, images, "2", "outlier channel 17 reaches", "(CLE)"),
    (a_spread_of_depthwise_channels, ("2", "weight", 5), images, "2", "of depthwise channels 480x", "(CLE)"),
    (a_relu6_that_is_rarely_full, ("1", "output", 5), spiky, "0", "ReLU6 range: it fills [0, 6] though", "8 bits"),
    (outlier_dimensions_of_a_layer_norm, None, tokens, "1", "LayerNorm outlier dimensions", "16 bits"),
]
HEADS = ("build", "bits", "draw", "layer", "cause", "cure")


@pytest.mark.parametrize(HEADS, CASES, ids=[case[0].__name__ for case in CASES])
def test_the_culprit_is_first_its_cause_named_and_every_fix_gains_what_it_said(build, bits, draw, layer, cause, cure):
    torch.manual_seed(0)
    model, batches = build().eval(), [draw(seed) for seed in range(0, 20, 2)]
    sim = qlab.QuantSim(model, batches[0], qlab.presets.w8a8())
    if bits is not None:
        where, part, width = bits
        getattr(sim[where], part).bits = width
    sim["input"].output.enabled = False
    sim.calibrate(batches)
    analysis = qlab.QuantAnalyzer(estimate=False).measure(sim, batches)
    assert analysis.ranking()[0] == layer
    assert analysis.ranking("disabled")[0] == layer
    found = analysis.diagnose(layer)
    assert cause in found.cause
    assert cure in found.fixes[0].label or cure in found.fixes[1].label
    assert found.fixes[0].predicted_gain > 3
    known, fresh = qlab.SQNR(batches[:8]), qlab.SQNR([draw(seed) for seed in range(50, 60, 2)])
    before = [float(sim.evaluate(score)) for score in (known, fresh)]
    for fix in found.fixes[:6]:
        twin = copy.deepcopy(sim)
        fix.apply(twin, batches[:8])
        gains = [float(twin.evaluate(score)) - base for score, base in zip((known, fresh), before, strict=True)]
        assert gains[0] == pytest.approx(fix.predicted_gain, abs=0.02), fix.label
        assert gains[1] == pytest.approx(fix.predicted_gain, abs=max(1.0, 0.25 * fix.predicted_gain)), fix.label
