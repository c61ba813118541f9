"""Small models that can fail in the ways that an analysis must survive."""

import copy
import functools

import torch
from torch import Tensor, nn

import qlab


class Branches(nn.Module):
    """A residual network with everything that shares or governs: fused groups, an addition, a concatenation, a reused
    grid, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.relu(y + self.depthwise(y))
        y = self.pool(torch.cat([self.left(y), self.right(y)], 1))
        return self.head(y.mean((2, 3)))


def branches(seed: int = 0) -> nn.Module:
    """The network in eval mode with BatchNorm statistics of noise and logits around 0, so that predictions differ."""
    torch.manual_seed(seed)
    model = Branches().train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 1, 8, 8))
        model.eval()
        model.head.bias -= model(torch.randn(200, 1, 8, 8)).mean(0)
    return model


def data(batches: int = 3, size: int = 12, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Labelled noise [size, 1, 8, 8], five classes; the last batch is smaller."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (batches - 1) + [size - 5]
    return [(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)) for n in sizes]


def calibrated(preset: qlab.Preset | None = None) -> qlab.QuantSim:
    """A calibrated sim of `branches`, a copy of one that is captured once."""
    return copy.deepcopy(_calibrated(preset or qlab.presets.w4a8()))


@functools.cache
def _calibrated(preset: qlab.Preset) -> qlab.QuantSim:
    labelled = data()
    sim = qlab.QuantSim(branches(), labelled[0][0], preset)
    sim.calibrate(labelled)
    return sim
