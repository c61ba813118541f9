"""Prints what the engine costs, as ratios measured side by side in one run.

    python benchmarks/engine.py [NAME ...] [--threads 1] [--repeats 7] [--forward] [--compile] [--memory] [--json FILE]

Names: kernel (rounding one tensor, and the import), digits_mobilenet, digits_resnet, resnet18, resnet50, mobilenet_v2,
vit_b_16, bert_base_encoder. The float forward is that of the same model with BatchNorm not folded unless a row says so,
in eval mode without gradient. Every row is a median of interleaved repeats, with the spread from the lower to the upper
quartile. With one thread the time is that of the processor, which other programs disturb little; with more it is that
of the wall. --forward: the rows of the forward pass only, for large models. --compile: sim.compile() as well.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import models
import torch
from torch import Tensor, nn

import qlab
from qlab.graph import Replay
from qlab.quantization.fake_quantize import fake_quantize, fake_quantize_
from qlab.sim import Role

DIGITS = {"digits_mobilenet": "mobilenet", "digits_resnet": "resnet"}
SIZE = (8, 3, 224, 224)
TOKENS = (8, 128, 768)
TENSOR = 1_605_632  # numbers: 32 channels of 112 x 112 positions, 4 images
Row = dict[str, float]


def load(name: str) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and one batch: 64 digits, or 8 images of noise."""
    if name in DIGITS:
        images = torch.cat([x for x, _ in qlab.examples.digits().test])
        return getattr(qlab.examples, DIGITS[name])().eval(), images[:64]
    size = TOKENS if name == "bert_base_encoder" else SIZE
    return models.warmed_up(getattr(models, name)(), size), torch.randn(size)


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call: of the processor where one thread computes, else of the wall."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def interleaved(repeats: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each work, one after the other in every repeat, so that a disturbance meets all of them."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            found.append(seconds(work))
    return times


def ratio(part: list[float], whole: list[float]) -> Row:
    """The ratio of the medians, and the quartiles of the ratios of each repeat."""
    each = sorted(a / b for a, b in zip(part, whole, strict=True))
    low, _, high = statistics.quantiles(each, n=4)
    return {"ratio": statistics.median(part) / statistics.median(whole), "low": low, "high": high}


def kernel(repeats: int) -> dict[str, Row]:
    """Rounding one tensor against ReLU on it, in place and not, and what the import costs."""
    x, encoding = torch.randn(TENSOR), qlab.Encoding(torch.tensor(0.02), torch.tensor(128.0), 0, 255)
    with torch.no_grad():
        inside, outside, rounded, rounded_ = interleaved(
            5 * repeats, x.relu_, x.relu, lambda: fake_quantize(x, encoding), lambda: fake_quantize_(x, encoding)
        )
    return {
        "rounding a copy / ReLU": ratio(rounded, outside),
        "rounding in place / ReLU": ratio(rounded_, outside),
        "rounding in place / ReLU in place": ratio(rounded_, inside),
        **import_seconds(5),
    }


def forward(model: nn.Module, x: Tensor, sim: qlab.QuantSim, repeats: int, with_compiled: bool) -> dict[str, Row]:
    """The sim's forward beside the float one, as it is, folded, and compiled; and the memory of each."""
    exact, quantized = interleaved(repeats, lambda: model(x), lambda: sim(x))
    rows = {"sim forward / float forward": ratio(quantized, exact)}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        folded = copy.deepcopy(sim)
        qlab.BatchNormFolding().apply(folded)
        folded.calibrate([x])
        exact, quantized = interleaved(repeats, lambda: folded.float_output(x), lambda: folded.output(x))
        rows["the same, BatchNorm folded in both"] = ratio(quantized, exact)
        del folded
    if with_compiled:
        compiled = sim.compile()
        exact, quantized = interleaved(repeats, lambda: model(x), lambda: compiled(x))
        rows["compiled sim forward / float forward"] = ratio(quantized, exact)
    return rows


@torch.no_grad()
def memory(name: str) -> dict[str, Row]:
    """Peaks above what is held anyway, weights among it; run with MALLOC_MMAP_THRESHOLD_=65536, so that what is freed
    is given back."""
    model, x = load(name)
    sim = qlab.QuantSim(model, x[:2])
    floats, calibrations, sims = (
        peak_bytes(work) for work in (lambda: model(x), lambda: sim.calibrate([x]), lambda: sim(x))
    )
    return {
        "peak memory, float forward, MiB": exactly(floats / 2**20),
        "peak memory, sim forward / float forward": exactly(sims / floats),
        "peak memory, calibrate / float forward": exactly(calibrations / floats),
    }


RESET = Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object]) -> int:
    """How much the memory of the process rises above its start while `work` is done."""

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    RESET.write_text("5")
    began = field("VmRSS")
    work()
    return field("VmHWM") - began


def exactly(value: float) -> Row:
    """A row of one measurement."""
    return {"ratio": value, "low": value, "high": value}


def measure(name: str, repeats: int, forward_only: bool = False, with_compiled: bool = False) -> dict[str, Row]:
    """The rows of one model."""
    if name == "kernel":
        return kernel(repeats)
    model, x = load(name)
    sim = qlab.QuantSim(model, x[:2])
    batches = [x] * (8 if name in DIGITS else 2)
    sim.calibrate(batches)
    with torch.no_grad():
        rows = forward(model, x, sim, repeats, with_compiled)
        if forward_only:
            return rows
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
        with tempfile.TemporaryDirectory() as folder:
            exact, exported = interleaved(3, lambda: model(x), lambda: sim.export(Path(folder) / "model"))
        rows["export / float forward"] = ratio(exported, exact)
    if name in (*DIGITS, "resnet18"):
        rows |= training(model, x, sim, max(repeats // 2, 3))
    return rows


def training(model: nn.Module, x: Tensor, sim: qlab.QuantSim, repeats: int) -> dict[str, Row]:
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


def import_seconds(repeats: int) -> dict[str, Row]:
    """What `import qlab` takes beyond `import torch`, in seconds of the processor."""

    def run(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    extra = sorted(run("import torch, qlab") - run("import torch") for _ in range(repeats))
    low, middle, high = statistics.quantiles(extra, n=4)
    return {"import qlab beyond import torch, seconds": {"ratio": middle, "low": low, "high": high}}


def _is_boundary(sim: qlab.QuantSim) -> Callable[[object], bool]:
    return lambda layer: sim.placed[layer.name].role is not Role.FUSED  # type: ignore[attr-defined]


def main() -> None:
    """Prints the table and, when asked, writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["kernel", "digits_mobilenet", "digits_resnet", "resnet18"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peaks of memory only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    found = {
        name: memory(name) if options.memory else measure(name, options.repeats, options.forward, options.compile)
        for name in options.names
    }
    for name, rows in found.items():
        print(f"{name} ({options.threads} thread{'s' if options.threads > 1 else ''})")
        for row, values in rows.items():
            print(f"  {row:55} {values['ratio']:6.3f}   {values['low']:.3f} to {values['high']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
