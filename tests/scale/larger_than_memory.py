"""Run as a program: calibrates and rounds a model whose weights lie in a file, and prints how much memory it took.

python larger_than_memory.py FILE BUDGET_BYTES BLOCKS: one line of JSON with the peaks in bytes of each stage, of a
model of one block and of one of BLOCKS.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import qlab

WIDTH, WIDE = 128, 16384
BLOCK_BYTES = 2 * WIDTH * WIDE * 4


class Block(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.up, self.gelu, self.down = (
            nn.Linear(WIDTH, wide, bias=False),
            nn.GELU(),
            nn.Linear(wide, WIDTH, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gelu(self.up(x)))


def network(blocks: int, wide: int = WIDE) -> nn.Module:
    return nn.Sequential(*(Block(wide) for _ in range(blocks)))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, WIDTH, generator=generator) for _ in range(6)]


def work(model: nn.Module, budget: int, rounded: str) -> dict[str, int]:
    """The peak within each stage, above what was held before all of them."""
    began, peaks = peak_bytes(), {}

    def stage(name: str) -> None:
        peaks[name] = peak_bytes() - began

    sim = qlab.QuantSim(model, batches()[0], qlab.presets.w4a8())
    stage("captured")
    sim.calibrate(batches(), max_bytes=budget)
    stage("calibrated")
    sim.output(batches()[0])
    stage("run")
    qlab.AdaRound(layers=rounded, memory=budget >> 20, iterations=20).apply(sim, batches())
    stage("rounded")
    return peaks


def peak_bytes() -> int:
    """The most memory held since the last call; the count begins anew."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(peak.split()[1])


def main(path: str, budget: int, blocks: int) -> None:
    torch.set_num_threads(1)
    with torch.device("meta"):
        small, large = network(1), network(blocks)
    qlab.map_weights(small, path)
    qlab.map_weights(large, path)
    work(network(1, wide=8), budget, "0.up")  # what is imported on the way is no growth
    peak_bytes()
    found = {
        "small": work(small, budget, "0.*"),
        "large": work(large, budget, f"{blocks // 2}.*"),  # the second by minibatches: it has too many inputs
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
