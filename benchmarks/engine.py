"""Prints what the engine costs, as ratios measured side by side in one run.

    python benchmarks/engine.py [NAME ...] [--threads 1] [--repeats 7] [--json FILE]

Names: digits_mobilenet, digits_resnet, resnet18, resnet50, mobilenet_v2, vit_b_16. The float forward is that of the
same model with BatchNorm not folded, in eval mode without gradient. Every row is a median of interleaved repeats, with
the spread from the lower to the upper quartile.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import models
import torch
from torch import Tensor, nn

import qlab
from qlab.graph import Replay
from qlab.sim import Role

DIGITS = {"digits_mobilenet": "mobilenet", "digits_resnet": "resnet"}
SIZE = (8, 3, 224, 224)


def load(name: str) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and one batch: 64 digits, or 8 images of noise."""
    if name in DIGITS:
        images = torch.cat([x for x, _ in qlab.examples.digits().test])
        return getattr(qlab.examples, DIGITS[name])().eval(), images[:64]
    return models.warmed_up(getattr(models, name)(), SIZE), torch.randn(SIZE)


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interleaved(repeats: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each work, one after the other in every repeat, so that a disturbance meets all of them."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            found.append(seconds(work))
    return times


def ratio(part: list[float], whole: list[float]) -> dict[str, float]:
    """The ratio of the medians, and the quartiles of the ratios of each repeat."""
    each = sorted(a / b for a, b in zip(part, whole, strict=True))
    low, _, high = statistics.quantiles(each, n=4)
    return {"ratio": statistics.median(part) / statistics.median(whole), "low": low, "high": high}


def measure(name: str, repeats: int) -> dict[str, dict[str, float]]:
    """The rows of one model."""
    model, x = load(name)
    sim = qlab.QuantSim(model, x[:2])
    batches = [x] * (8 if name in DIGITS else 2)
    sim.calibrate(batches)
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        exact, quantized = interleaved(repeats, lambda: model(x), lambda: sim(x))
        rows["sim forward / float forward"] = ratio(quantized, exact)
        for rule in ("min_max", "sqnr", "entropy"):
            sim.configure("*", output={"rule": rule})
            few = max(repeats // 2, 3)
            exact, calibrated = interleaved(few, lambda: [model(b) for b in batches], lambda: sim.calibrate(batches))
            rows[f"calibrate {rule}, {len(batches)} batches / float forwards"] = ratio(calibrated, exact)
        replay = Replay(sim.graph, [sim.inputs(x)], sim.call, sim.fingerprint, _is_boundary(sim))
        replay.outputs()
        weighted = [layer for layer in sim.layers.values() if layer.weight is not None]
        places = {"input": weighted[0], "middle": weighted[len(weighted) // 2], "output": weighted[-1]}
        for place, layer in places.items():

            def edit(layer: qlab.sim.QuantizedLayer = layer) -> None:
                assert layer.weight is not None
                layer.weight.bits = 12 - layer.weight.bits
                replay.outputs()

            full, edited = interleaved(repeats, lambda: sim(x), edit)
            rows[f"edit near the {place} / sim forward"] = ratio(edited, full)
    if name in (*DIGITS, "resnet18"):
        rows |= training(model, x, sim, max(repeats // 2, 3))
    return rows


def training(model: nn.Module, x: Tensor, sim: qlab.QuantSim, repeats: int) -> dict[str, dict[str, float]]:
    """A training step of each mode against a float step with the same optimizer."""

    def stepper(module: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)

        def step() -> None:
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()

        return step

    rows = {}
    for mode in ("regular", "range_learning"):
        sim.qat(mode)
        exact, quantized = interleaved(repeats, stepper(model), stepper(sim))
        rows[f"training step, {mode} / float step"] = ratio(quantized, exact)
        sim.qat(None)
    return rows


def import_seconds(repeats: int) -> dict[str, dict[str, float]]:
    """What `import qlab` takes beyond `import torch`, in seconds."""

    def run(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    torch_alone, both = interleaved(repeats, run("import torch"), run("import torch, qlab"))
    extra = sorted(b - t for b, t in zip(both, torch_alone, strict=True))
    low, middle, high = statistics.quantiles(extra, n=4)
    return {"import qlab beyond import torch, seconds": {"ratio": middle, "low": low, "high": high}}


def _is_boundary(sim: qlab.QuantSim) -> Callable[[object], bool]:
    return lambda layer: sim.placed[layer.name].role is not Role.FUSED  # type: ignore[attr-defined]


def main() -> None:
    """Prints the table and, when asked, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["digits_mobilenet", "digits_resnet", "resnet18"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    found = {"import": import_seconds(5)}
    for name in options.names:
        found[name] = measure(name, options.repeats)
    for name, rows in found.items():
        print(f"{name} ({options.threads} thread{'s' if options.threads > 1 else ''})")
        for row, values in rows.items():
            print(f"  {row:55} {values['ratio']:6.3f}   {values['low']:.3f} to {values['high']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
