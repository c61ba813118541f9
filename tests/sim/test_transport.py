"""A sim travels to another process as bytes and computes there what it computes here."""

import dataclasses
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.errors import InputError
from qlab.sim.transport import from_bytes, to_bytes


@dataclasses.dataclass
class Pair:
    logits: Tensor
    hidden: Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Pair:
        hidden = torch.cat([torch.relu(self.conv(x)) * self.scale, x[:, :, 1:-1, 1:-1]], 1)[:, :4]
        return Pair(self.head(hidden.mean((2, 3))), hidden)


def calibrated(model=None):
    x = torch.randn(6, 1, 8, 8)
    sim = qlab.QuantSim(model or Net(), x, qlab.presets.w4a8())
    sim.calibrate([x])
    return sim, x


def test_a_pickled_sim_computes_the_same_with_its_rounding_and_settings():
    sim, x = calibrated()
    weight = sim["conv"].weight
    encoding = weight.required_encoding()
    weight.set_rounding(torch.floor(weight.weight / encoding.scale).clamp(encoding.qmin, encoding.qmax))
    sim["head"].output.enabled = False
    twin = pickle.loads(pickle.dumps(sim))
    ours, theirs = sim.output(x), twin.output(x)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.hidden, theirs.hidden)
    assert twin["conv"].weight.rounding is not None
    assert twin.origin == sim.origin
    twin["conv"].weight.bits = 2
    assert sim["conv"].weight.bits == 4


def test_a_class_that_only_the_notebook_knows_is_not_needed_in_the_other_process():
    secret = type("Notebook", (nn.Sequential,), {"__module__": "__main__"})
    sim, x = calibrated(secret(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)))
    code = (
        "import sys, torch; from qlab.sim.transport import from_bytes, to_bytes; torch.set_num_threads(1)\n"
        "sim, x = from_bytes(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(to_bytes(sim.output(x)))"
    )
    run = subprocess.run([sys.executable, "-c", code], input=to_bytes((sim, x)), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert torch.equal(from_bytes(run.stdout), sim.output(x))


def test_what_cannot_travel_is_said():
    with pytest.raises(InputError, match="cannot be sent to another process"):
        to_bytes(threading.Lock())
