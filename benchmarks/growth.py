"""How time and memory grow with the number of layers: capture, calibrate, analyze, the dashboard.

    python -m benchmarks.growth [--sizes 20 50 ...] [--keep]   # 20, 50, 100, 200, 500 and 1,000 layers, a few minutes
    python -m benchmarks.growth --show                         # the exponents of what is kept, and its picture anew

The network is a chain of blocks of four layers: a 3x3 convolution of 8 channels, a ReLU, a 1x1 convolution, and the
addition of the block's input. Images are small (4 x 8 x 8 x 8), so that the work of each layer is what is seen. Every
size runs in a process of its own. The exponent is the slope of the times over the layers, both as logarithms, from 100
layers on, where what is done once no longer counts: 1 is linear. Scoring every layer alone is a full run for each, so
of the sweep ten layers are measured, and of the estimate, which is one pass forward and back, all. The dashboard is the
kernel's side: a Lab, its widgets, and the bytes of their state. Memory is what the process holds more at the peak.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qlab
from benchmarks.measuring import RESET, exactly, peak_bytes, seconds
from benchmarks.record import Record

SIZES = (20, 50, 100, 200, 500, 1000)
FROM = 100  # layers from which the exponent is taken
LIMIT = 1.15  # an exponent above it is not linear
ANALYZED = 10
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "growth.svg"
COLOURS = ("#4477aa", "#ee7733", "#228833", "#cc3377", "#009988")  # one a stage
Found = dict[str, dict[str, dict[str, float]]]
"""Size, as text for JSON, to stage to seconds, MiB and, of the dashboard, bytes."""


class Block(nn.Module):
    """Four layers: convolution, ReLU, convolution, addition."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.relu, self.mix = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.mix.weight.mul_(0.2)  # so that a thousand of them stay finite

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.relu(self.spread(x)))


class Chain:
    """The network of so many layers, and the stages that are measured; capture comes before the others."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block() for _ in range(layers // 4))).eval()
        self.batches = [torch.randn(4, 8, 8, 8) for _ in range(2)]
        self.sim: Any = None
        self.stages = {
            "capture": self.capture,
            "calibrate": lambda: self.sim.calibrate(self.batches),
            "analyze, 10 layers": self.analyze,
            "analyze, estimate": self.estimate,
            "dashboard": self.dashboard,
        }

    def capture(self) -> None:
        """Changes `sim`."""
        self.sim = qlab.QuantSim(self.model, self.batches[0])

    def analyze(self) -> None:
        """Ten layers, spread over the network, alone and off."""
        weighted = [layer.name for layer in self.sim.layers.values() if layer.weight is not None]
        some = weighted[:: max(len(weighted) // ANALYZED, 1)][:ANALYZED]
        qlab.QuantAnalyzer(estimate=False, layers=some).measure(self.sim, self.batches)

    def estimate(self) -> None:
        """Every layer, from one pass."""
        qlab.QuantAnalyzer(enabled=False, disabled=False).measure(self.sim, self.batches)

    def dashboard(self) -> int:
        """Builds the dashboard as the last line of a cell does; the bytes of its widgets, which go to the page."""
        from ipywidgets.widgets.widget import _instances, _remove_buffers

        before = set(_instances)
        shown = qlab.views.Dashboard(qlab.Lab(self.sim, self.batches))
        size = 0
        for widget in [widget for key, widget in _instances.items() if key not in before]:
            state, _, buffers = _remove_buffers(widget.get_state())
            size += len(json.dumps(state, default=str)) + sum(memoryview(buffer).nbytes for buffer in buffers)
        shown.close()
        return size


def measure(layers: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, peak in MiB and, of the dashboard, bytes of each stage of one size."""
    torch.set_num_threads(1)
    for work in Chain(8).stages.values():  # everything is imported
        work()
    chain, found = Chain(layers), {}
    for name, work in chain.stages.items():
        peak = peak_bytes(work) if RESET.exists() else 0
        gc.collect()
        times = [seconds(work) for _ in range(1 if name == "capture" and layers > FROM else repeats)]
        found[name] = {"seconds": min(times), "MiB": peak / 2**20}
    found["dashboard"]["bytes"] = chain.dashboard()
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(value) over log(size) by least squares.

    >>> round(exponent([10, 20, 40], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def exponents(found: Found, what: str = "seconds") -> dict[str, float]:
    """The exponent of each stage, over the sizes that count."""
    sizes = [size for size in sorted(map(int, found)) if size >= FROM]
    each = {}
    for stage in found[str(sizes[0])]:
        values = [found[str(size)][stage].get(what, 0.0) for size in sizes]
        if len(sizes) > 1 and all(value > 0 for value in values):
            each[stage] = exponent(sizes, values)
    return each


def told(found: Found) -> str:
    """The figures as text."""
    stages = list(next(iter(found.values())))
    lines = [f"{'layers':>8}" + "".join(f"{stage:>26}" for stage in stages)]
    for size in sorted(found, key=int):
        cells = [f"{found[size][stage]['seconds']:.2f} s, {found[size][stage]['MiB']:.0f} MiB" for stage in stages]
        lines.append(f"{size:>8}" + "".join(f"{cell:>26}" for cell in cells))
    for what in ("seconds", "MiB", "bytes"):
        by_stage = exponents(found, what)
        cells = [f"{by_stage[stage]:.2f}" if stage in by_stage else "" for stage in stages]
        lines.append(
            f"{'exponent':>8}" + "".join(f"{cell:>26}" for cell in cells) + f"   of {what}, from {FROM} layers on"
        )
    return "\n".join(lines)


def picture(found: Found) -> str:
    """Seconds over layers, both as logarithms, as an SVG that stands alone; ink reads on white and on black."""
    sizes = sorted(map(int, found))
    stages = list(found[str(sizes[0])])
    every = [found[str(size)][stage]["seconds"] for size in sizes for stage in stages]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    left, top, wide, tall = 60, 40, 430, 270

    def x(size: float) -> float:
        return left + wide * math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])

    def y(value: float) -> float:
        return top + tall * (high - math.log10(value)) / (high - low)

    parts = [f'<text x="{left}" y="22" font-weight="bold">Seconds as a model grows, one thread</text>']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{left} {at:.1f}h{wide}" stroke="#888" stroke-opacity=".3"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for size in sizes:
        parts.append(f'<text x="{x(size):.1f}" y="{top + tall + 18}" text-anchor="middle">{size:,}</text>')
    parts.append(f'<text x="{left + wide / 2}" y="{top + tall + 38}" text-anchor="middle">layers</text>')
    by_stage = exponents(found)
    ends = _apart([y(found[str(sizes[-1])][stage]["seconds"]) for stage in stages])
    for stage, colour, end in zip(stages, COLOURS, ends, strict=False):
        points = [(x(size), y(found[str(size)][stage]["seconds"])) for size in sizes]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        slope = f", n^{by_stage[stage]:.2f}" if stage in by_stage else ""
        parts.append(f'<text x="{left + wide + 10}" y="{end + 4:.1f}" fill="{colour}">{stage}{slope}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 360" width="700" height="360" role="img" '
        'font-family="sans-serif" font-size="12" fill="#777"><title>Seconds of each stage over the number of layers'
        f"</title>{''.join(parts)}</svg>\n"
    )


def _apart(places: list[float], gap: float = 15.0) -> list[float]:
    """The places of labels, moved down where two would touch.

    >>> _apart([10.0, 12.0, 40.0])
    [10.0, 25.0, 40.0]
    """
    moved, last = list(places), -math.inf
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        last = moved[index] = max(places[index], last + gap)
    return moved


def main() -> None:
    """Measures each size in a process of its own, and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    for flag in ("--keep", "--again", "--show"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.repeats)))
        return
    record = Record("growth", options.keep or options.show, options.again)
    found = record.found.setdefault("sizes", {})
    for size in () if options.show else options.sizes:
        if record.lacks("growth", 1, str(size)):
            command = [sys.executable, "-m", "benchmarks.growth", "--one", str(size), "--repeats", str(options.repeats)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            run = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            found[str(size)] = json.loads(run.stdout.splitlines()[-1])
            record.add("growth", 1, str(size), {})
    print(told(found))
    if len([size for size in found if int(size) >= FROM]) > 1:
        largest = found[max(found, key=int)]
        rows = {f"{stage}: exponent of seconds": exactly(slope) for stage, slope in exponents(found).items()}
        for what in ("seconds", "MiB"):
            rows |= {
                f"{stage}: {what} at {max(found, key=int)} layers": exactly(largest[stage][what]) for stage in largest
            }
        if not options.show:
            record.add("growth", 1, "exponents", rows)
        if options.keep or options.show:
            PICTURE.write_text(picture(found), encoding="utf-8")
    steep = [stage for stage, slope in exponents(found).items() if slope > LIMIT]
    print(f"steeper than {LIMIT}: {', '.join(steep) or 'none'}")


if __name__ == "__main__":
    main()
