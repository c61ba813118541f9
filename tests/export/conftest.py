"""The recorded reference network and small things that several tests of export need."""

import copy
import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import qlab

RECORDED = Path(__file__).parents[1] / "data" / "reference"


class Reference(nn.Module):
    """The network of tests/data/reference, its BatchNorm folded by torch itself."""

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


@pytest.fixture(scope="session")
def recorded():
    return {name: torch.from_numpy(value) for name, value in np.load(RECORDED / "activations.npz").items()}


@pytest.fixture(scope="session")
def reference_sim(recorded):
    """A sim of the recorded network by granularity, not calibrated."""

    @functools.cache
    def captured(granularity):
        preset = dataclasses.replace(
            qlab.presets.w8a8(per_channel=granularity == "per_channel"), supergroups=(("conv", "relu"),)
        )
        return qlab.QuantSim(Reference(), recorded["input"], preset)

    return lambda granularity: copy.deepcopy(captured(granularity))


def run_onnx(path, *inputs, optimised=False, wanted=None):
    """ONNX Runtime's results of a file, with graph optimisations off unless asked for."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(value) for value in session.run(wanted, feeds)]
