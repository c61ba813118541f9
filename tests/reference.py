"""The network recorded in tests/data/reference, its BatchNorm folded by torch itself, and what was recorded of it."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

RECORDED = Path(__file__).parent / "data" / "reference"
GRANULARITIES = ["per_tensor", "per_channel"]


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
        weights = np.load(RECORDED / "weights.npz")
        self.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        self.eval()
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()

    def forward(self, x):
        return self.fc(self.flatten(self.pool(self.relu2(self.depthwise(self.relu(self.bn(self.conv(x))))))))


@functools.cache
def recorded() -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(RECORDED / "activations.npz").items()}
