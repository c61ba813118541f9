"""Everything runs where the model is; on another device the numbers are those of the CPU up to float32 rounding."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.graph import Replay
from qlab.techniques import TECHNIQUES
from tests.techniques.test_transactions import OWN, QUICK

BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
LABELLED = [(x, torch.arange(8) % 5) for x in BATCHES]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc((torch.relu(self.depthwise(x)) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def on_cpu() -> qlab.QuantSim:
    torch.manual_seed(0)
    sim = qlab.QuantSim(Small().eval(), BATCHES[0], qlab.presets.w4a8(per_channel=True))
    sim.calibrate(BATCHES)
    return sim


def moved(sim: qlab.QuantSim, device: torch.device) -> qlab.QuantSim:
    return copy.deepcopy(sim).to(device)


def close(have: Any, want: Tensor) -> bool:
    """All but a few values on the edge of a rounding step agree."""
    have = have.detach().cpu()
    return bool((have - want).abs().mean() <= 0.02 * want.std())


def test_a_model_on_a_device_is_captured_and_calibrated_there(on_cpu, device):
    model = copy.deepcopy(on_cpu.model).to(device)
    torch.manual_seed(0)
    sim = qlab.QuantSim(Small().eval().to(device), BATCHES[0], qlab.presets.w4a8(per_channel=True))
    sim.calibrate(BATCHES)
    assert {p.device.type for p in model.parameters()} == {sim.device.type} == {device.type}
    for key, quantizer in on_cpu.quantizers.items():
        torch.testing.assert_close(
            sim.quantizers[key].encoding.scale.cpu(), quantizer.encoding.scale, rtol=1e-3, atol=0
        )
    assert close(sim.output(BATCHES[0]), on_cpu.output(BATCHES[0]))


def test_a_sim_moves_between_devices_and_keeps_its_grids(on_cpu, device):
    sim = moved(on_cpu, device)
    assert close(sim(BATCHES[0].to(device)), on_cpu.output(BATCHES[0]))
    sim["conv"].weight.bits = 2
    back = sim.to("cpu")
    twin = copy.deepcopy(on_cpu)
    twin["conv"].weight.bits = 2
    assert close(back.output(BATCHES[0]), twin.output(BATCHES[0]))
    assert float(back.evaluate(qlab.SQNR(BATCHES))) == pytest.approx(float(twin.evaluate(qlab.SQNR(BATCHES))), rel=0.02)


def test_replay_equals_full_runs(on_cpu, device):
    sim = moved(on_cpu, device)
    with torch.no_grad():
        replay = Replay(sim.graph, [sim.inputs(BATCHES[0])], sim.call, sim.fingerprint)
        replay.outputs()
        sim["depthwise"].weight.bits = 3
        assert torch.equal(replay.outputs()[0], sim.output(BATCHES[0]))


@pytest.mark.parametrize("name", [name for name in OWN if name != "MixedPrecision"])
def test_every_technique_runs_and_leaves_the_sim_on_its_device(on_cpu, device, name):
    sim = moved(on_cpu, device)
    TECHNIQUES[name](**QUICK.get(name, {})).apply(sim, LABELLED, score=qlab.SQNR(BATCHES))
    tensors = [*sim.parameters(), *(b for b in sim.model.buffers())]
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert sim.output(BATCHES[0]).device.type == device.type
    assert torch.isfinite(sim.output(BATCHES[0])).all()


def test_analysis_and_mixed_precision_run(on_cpu, device):
    sim = moved(on_cpu, device)
    analysis = qlab.QuantAnalyzer(probe_batches=1).measure(sim, BATCHES, qlab.Accuracy(LABELLED))
    assert analysis.enabled.score.notna().all()
    report = qlab.MixedPrecision(bits=(3, 4, 8), budget=5).apply(sim, BATCHES)
    assert report.values["cost"] <= report.values["budget"]


def test_a_file_written_on_one_device_is_read_on_another(on_cpu, device, tmp_path):
    sim = moved(on_cpu, device)
    sim.save(tmp_path / "sim.safetensors")
    read = qlab.load(tmp_path / "sim.safetensors", Small().eval(), BATCHES[0])
    assert close(read.output(BATCHES[0]), on_cpu.output(BATCHES[0]))
