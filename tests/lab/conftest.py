"""A small network with folding, a residual addition and a linear layer, captured once for all tests of the lab."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qlab
from qlab.progress import Progress
from qlab.settings import setting
from qlab.sim import Batches, QuantSim
from qlab.techniques import Report, Technique


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class _Nudge(Technique):  # the underscore keeps it out of TECHNIQUES
    """Adds to every weight in a number of steps; what a test does at each step is up to it."""

    steps: int = setting(3, "how many", minimum=1)
    at_step: Any = setting(None, "called at each step", hidden=True)  # noqa: RUF009

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        with torch.no_grad():
            for step in range(self.steps):
                progress.step(step, self.steps, f"nudge {step}")
                for parameter in sim.model.parameters():
                    parameter.add_(0.01)
                if self.at_step is not None:
                    self.at_step(step)
        return Report("_Nudge", f"nudged {self.steps} times")


@pytest.fixture(scope="session")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="session")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]


@pytest.fixture(scope="session")
def labelled(batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.arange(8) % 4) for batch in batches]


@pytest.fixture(scope="session")
def captured(network: nn.Module, batches: list[Tensor]) -> QuantSim:
    sim = QuantSim(network, batches[0], qlab.presets.w8a8())
    sim.calibrate(batches)
    return sim


@pytest.fixture
def sim(captured: QuantSim) -> QuantSim:
    return copy.deepcopy(captured)


@pytest.fixture
def lab(sim: QuantSim, batches: list[Tensor], labelled: list[tuple[Tensor, Tensor]]) -> qlab.Lab:
    return qlab.Lab(sim, batches, score=qlab.Accuracy(labelled))


@pytest.fixture
def nudge() -> type[_Nudge]:
    return _Nudge


def state_of(sim: QuantSim) -> dict[str, Any]:
    """Everything that computes in a sim: weights, and each quantizer's settings, grid and roundings."""
    found: dict[str, Any] = {f"model.{k}": v.clone() for k, v in sim.model.state_dict().items()}
    for name, quantizer in sim.quantizers.items():
        _ = quantizer.encoding  # a weight's grid is found when it is first looked at
        state = quantizer.state()
        found[name] = (state.spec, state.enabled, state.frozen)
        for part in ("scale", "zero_point"):
            found[f"{name}.{part}"] = None if state.encoding is None else getattr(state.encoding, part)
        found[f"{name}.grid"] = None if state.encoding is None else (state.encoding.qmin, state.encoding.qmax)
        found[f"{name}.codes"], found[f"{name}.bias_correction"] = state.codes, state.bias_correction
    return found


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names under which two states are not equal, bit for bit."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or bool(x == y)

    return [name for name in a.keys() | b.keys() if not same(a.get(name), b.get(name))]
