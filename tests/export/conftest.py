"""The recorded network as a sim, and ONNX Runtime as an oracle."""

import copy
import dataclasses
import functools

import onnxruntime
import pytest
import torch

import qlab
from tests.reference import Reference, recorded


@pytest.fixture(scope="session")
def reference_sim():
    """A sim of the recorded network by granularity, not calibrated."""

    @functools.cache
    def captured(granularity):
        preset = dataclasses.replace(
            qlab.presets.w8a8(per_channel=granularity == "per_channel"), supergroups=(("conv", "relu"),)
        )
        return qlab.QuantSim(Reference(), recorded()["input"], preset)

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
