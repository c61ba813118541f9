"""Networks captured once, sims of them by preset, their exported files, and ONNX Runtime as an oracle."""

import copy
import dataclasses
import functools

import onnxruntime
import pytest
import torch
from torch import nn

import qlab
from qlab.examples.transformer import CharGPT, VisionTransformer
from qlab.export import float_model
from qlab.export.tensors import updated_values
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


@dataclasses.dataclass(frozen=True)
class Network:
    """A captured network with data: batches to calibrate on, labelled batches to test on."""

    sim: qlab.QuantSim
    calibration: list
    test: list


@functools.cache
def network(name):
    """'mobilenet', 'resnet' and 'vit' on digits, a small character 'gpt', and a tiny 'encoder'."""
    torch.manual_seed(0)
    if name == "gpt":
        text = qlab.examples.source_text()
        calibration, test = text.calibration(2), text.test[:4]
        model = trained_gpt(text)
    else:
        digits = qlab.examples.digits()
        calibration, test = digits.calibration(2), digits.test[:2]
        builders = {"encoder": lambda: VisionTransformer(width=16, heads=2, depth=1).eval()}
        model = builders.get(name, getattr(qlab.examples, name, None))()
    return Network(qlab.QuantSim(model, calibration[0]), calibration, test)


def trained_gpt(text, steps=40):
    """A character GPT of two blocks after a few seconds of training: its logits are no longer noise."""
    model, generator = CharGPT(width=64, heads=2, depth=2), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = text.training_batch(generator)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def sim_of(name, preset):
    """A calibrated sim of a network under a preset, BatchNorm folded; capturing it for each would take seconds."""
    captured = network(name)
    sim = copy.deepcopy(captured.sim)
    sim.preset = preset
    sim._install(sim.graph.root)
    sim.eval()
    if name in ("mobilenet", "resnet"):
        qlab.BatchNormFolding().apply(sim)
    sim.calibrate(captured.calibration)
    return sim


TRACES = {}


@pytest.fixture
def traced_once(monkeypatch):
    """The float graph of a network is traced once for all presets: it takes seconds, and no preset changes it."""
    trace = float_model.trace

    def traced(sim, opset):
        key = sim.origin, opset
        if key not in TRACES:
            TRACES[key] = trace(sim, opset)
        return dataclasses.replace(TRACES[key], values=updated_values(sim))

    monkeypatch.setattr(float_model, "trace", traced)
