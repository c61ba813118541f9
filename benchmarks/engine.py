"""What the engine costs, as ratios measured side by side in one run.

    python -m benchmarks.engine [NAME ...] [--steps forward ...] [--threads 1] [--repeats 7] [--compile] [--keep]

Names: kernel (rounding one tensor, and the import), and those of benchmarks/models.py. The float forward is that of the
same model with BatchNorm not folded unless a row says so, in eval mode without gradient. Every ratio is one of medians
of interleaved repeats, with its quartiles; what is told in seconds is a median. The forward pass is measured on
the batch that the table names, everything else of the four large ones on two samples. Steps: forward, calibrate
(every range rule, on 8 batches of the digits or 2 of the others), edit, export, memory, dashboard. --keep: kept for the
table, and what is done is not measured again.
"""

import argparse
import copy
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

import qlab
from benchmarks.measuring import RESET, Row, exactly, interleaved, middle, peak_bytes, ratio, seconds
from benchmarks.models import DIGITS, LARGE, NAMES, load
from benchmarks.record import Record
from qlab.graph import Replay
from qlab.quantization.fake_quantize import fake_quantize, fake_quantize_
from qlab.sim import QuantizedLayer, Role

TENSORS = {"6 MB": 1_605_632, "26 MB": 6_422_528}  # 4 images of 32, and 8 of 64 channels, of 112 x 112 positions
RULES = ("min_max", "percentile", "mse", "sqnr", "entropy")
UNFRAGMENTED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, so that peaks are peaks


class Case:
    """A model, its batch, its sim calibrated on the batches that most steps take; made when first asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def loaded(self) -> tuple[nn.Module, Tensor]:
        """The model and the batch that the table names."""
        return load(self.name)

    @property
    def model(self) -> nn.Module:
        """In eval mode."""
        return self.loaded[0]

    @property
    def batches(self) -> list[Tensor]:
        """What calibration takes."""
        x = self.loaded[1]
        return [x] * 8 if self.name in DIGITS else [x[:2] if self.name in LARGE else x] * 2

    @cached_property
    def sim(self) -> qlab.QuantSim:
        """Calibrated."""
        sim = qlab.QuantSim(self.model, self.loaded[1][:2])
        sim.calibrate(self.batches)
        return sim


@torch.no_grad()
def kernel(repeats: int) -> dict[str, Row]:
    """Rounding a tensor against ReLU on it, in place and not: one that stays in most caches, and one that does not."""
    rows, encoding = {}, qlab.Encoding(torch.tensor(0.02), torch.tensor(128.0), 0, 255)
    for size, numbers in TENSORS.items():
        x = torch.randn(numbers)
        works = (x.relu_, x.relu, lambda x=x: fake_quantize(x, encoding), lambda x=x: fake_quantize_(x, encoding))
        inside, outside, rounded, rounded_ = interleaved(5 * repeats, *works)
        rows |= {
            f"rounding a copy / ReLU, {size}": ratio(rounded, outside),
            f"rounding in place / ReLU, {size}": ratio(rounded_, outside),
            f"rounding in place / ReLU in place, {size}": ratio(rounded_, inside),
        }
    return rows


@torch.no_grad()
def forward(case: Case, repeats: int) -> dict[str, Row]:
    """The sim's forward beside the float one, as it is and folded."""
    model, x = case.loaded
    exact, quantized = interleaved(repeats, lambda: model(x), lambda: case.sim(x))
    rows = {"sim forward / float forward": ratio(quantized, exact)}
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        folded = copy.deepcopy(case.sim)
        qlab.BatchNormFolding().apply(folded)
        folded.calibrate(case.batches)
        exact, quantized = interleaved(repeats, lambda: folded.float_output(x), lambda: folded.output(x))
        rows["sim forward / float forward, BatchNorm folded in both"] = ratio(quantized, exact)
    return rows


@torch.no_grad()
def compiled(case: Case, repeats: int) -> dict[str, Row]:
    """The compiled sim beside the float model as it is, and beside the compiled float model."""
    model, x = case.loaded
    ours, theirs = case.sim.compile(), torch.compile(model)
    exact, fast, quantized = interleaved(repeats, lambda: model(x), lambda: theirs(x), lambda: ours(x))
    return {
        "compiled sim forward / float forward": ratio(quantized, exact),
        "compiled sim forward / compiled float forward": ratio(quantized, fast),
    }


@torch.no_grad()
def calibrate(case: Case, repeats: int) -> dict[str, Row]:
    """Calibration by each rule beside the float forwards of the same batches."""
    rows = {}
    for rule in RULES:
        case.sim.configure("*", output={"rule": rule})
        exact, calibrated = interleaved(
            max(repeats // 2, 2),
            lambda: [case.model(x) for x in case.batches],
            lambda: case.sim.calibrate(case.batches),
        )
        rows[f"calibrate {rule} / float forwards"] = ratio(calibrated, exact)
    return rows


@torch.no_grad()
def edit(case: Case, repeats: int) -> dict[str, Row]:
    """One weight at other bits and the outputs that follow, beside a full forward of the sim."""
    x, sim = case.batches[0], case.sim
    replay = replay_of(sim, x)
    weighted = [layer for layer in sim.layers.values() if layer.weight is not None]
    rows = {}
    for place, layer in (("input", weighted[0]), ("middle", weighted[len(weighted) // 2]), ("output", weighted[-1])):
        full, edited = interleaved(repeats, lambda: sim(x), edit_of(layer, replay))
        rows[f"edit near the {place} / sim forward"] = ratio(edited, full)
    return rows


def replay_of(sim: qlab.QuantSim, x: Tensor) -> Replay:
    """What remembers values of one batch, filled."""

    def is_boundary(layer: object) -> bool:
        return sim.placed[layer.name].role is not Role.FUSED  # type: ignore[attr-defined]

    replay = Replay(sim.graph, [sim.inputs(x)], sim.call, sim.fingerprint, is_boundary)
    replay.outputs()
    return replay


def edit_of(layer: QuantizedLayer, replay: Replay) -> Callable[[], None]:
    """Switches a weight between 8 and 4 bits, and runs what follows."""

    def change() -> None:
        assert layer.weight is not None
        layer.weight.bits = 12 - layer.weight.bits
        replay.outputs()

    return change


def export(case: Case, repeats: int) -> dict[str, Row]:
    """Seconds to write the ONNX files and encodings."""
    with tempfile.TemporaryDirectory() as folder:
        times = [seconds(lambda: case.sim.export(Path(folder) / "model")) for _ in range(min(repeats, 3))]
    return {"export, s": middle(times)}


def dashboard(case: Case, repeats: int) -> dict[str, Row]:
    """Seconds of the kernel until the dashboard's widgets are there; benchmarks/dashboard.py measures the page."""

    def build() -> None:
        qlab.views.Dashboard(qlab.Lab(case.sim, case.batches)).close()

    build()
    return {"dashboard built in the kernel, s": middle([seconds(build) for _ in range(min(repeats, 5))])}


def memory(case: Case, repeats: int) -> dict[str, Row]:
    """Peaks above what is held before, weights among it; see `peak_bytes`."""
    small = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    for work in works_of_memory(small, [torch.randn(2, 1, 8, 8)]).values():  # everything is imported
        work()
    peaks = {name: peak_bytes(work) for name, work in works_of_memory(case.model, case.batches).items()}
    base, step = peaks.pop("float forward"), peaks.pop("float step")
    rows = {"peak memory, float forward, MiB": exactly(base / 2**20)}
    for name, peak in peaks.items():
        other, whole = ("float step", step) if name.startswith("training") else ("float forward", base)
        rows[f"peak memory, {name} / {other}"] = exactly(peak / max(whole, 1))
    return rows


def works_of_memory(model: nn.Module, batches: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Whose peaks are measured, in this order."""
    x, float_twin, sim = batches[0], copy.deepcopy(model), qlab.QuantSim(model, batches[0][:2])
    weighted = [name for name, layer in sim.layers.items() if layer.weight is not None]
    some = weighted[len(weighted) // 2]

    def float_forward() -> None:
        with torch.no_grad():
            model(x)

    def export() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sim.export(Path(folder) / "model")

    def replayed() -> None:
        with torch.no_grad():
            edit_of(sim[weighted[0]], replay_of(sim, x))()

    def step(module: nn.Module) -> None:
        module(x).square().mean().backward()

    def trained(mode: str) -> None:
        sim.zero_grad()
        sim.qat(mode)
        step(sim)

    return {
        "float forward": float_forward,
        "calibrate": lambda: sim.calibrate(batches),
        "sim forward": lambda: sim.output(x),
        "edit near the input, all remembered": replayed,
        "analyzer of one layer, estimate of all": lambda: qlab.QuantAnalyzer(layers=some).measure(sim, [x]),
        "AdaRound of one layer": lambda: qlab.AdaRound(layers=some).apply(sim, [x]),
        "export": export,
        "dashboard": lambda: qlab.views.Dashboard(qlab.Lab(sim, [x])).close(),
        "float step": lambda: step(float_twin),
        "training step, regular": lambda: trained("regular"),
        "training step, range learning": lambda: trained("range_learning"),
    }


def import_seconds(repeats: int) -> dict[str, Row]:
    """What `import qlab` takes beyond `import torch`, in seconds of the processor."""
    return {"import beyond import torch, s": middle([extra_seconds("qlab") for _ in range(repeats)])}


def extra_seconds(package: str) -> float:
    """Processor seconds of a process that imports torch and the package, less those of one that imports torch."""

    def run(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run(f"import torch, {package}") - run("import torch")


STEPS: dict[str, Callable[[Case, int], dict[str, Row]]] = {
    "forward": forward,
    "calibrate": calibrate,
    "edit": edit,
    "export": export,
    "dashboard": dashboard,
    "memory": memory,
    "compiled": compiled,
}


def main() -> None:
    """Measures what was asked for, and keeps it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["kernel", *NAMES])
    parser.add_argument("--steps", nargs="+", default=[step for step in STEPS if step != "compiled"], choices=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    for flag in ("--keep", "--again"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = Record("engine", options.keep, options.again)
    for name in options.names:
        torch.manual_seed(0)
        if name == "kernel":
            for step, work in (("rounding", kernel), ("import", import_seconds)):
                if (step == "rounding" or options.threads == 1) and record.lacks(name, options.threads, step):
                    record.add(name, options.threads, step, work(options.repeats))
            continue
        case = Case(name)
        for step in options.steps:
            if step == "memory" and (not RESET.exists() or options.threads > 1):
                continue
            if not record.lacks(name, options.threads, step):
                continue
            if step == "memory" and not UNFRAGMENTED.items() <= os.environ.items():
                command = [sys.executable, "-m", "benchmarks.engine", name, "--steps", "memory"]
                command += ["--keep"] if options.keep else []
                command += ["--again"] if options.again else []
                subprocess.run(command, check=True, env=os.environ | UNFRAGMENTED)
                record = Record("engine", options.keep, options.again)
                continue
            record.add(name, options.threads, step, STEPS[step](case, options.repeats))


if __name__ == "__main__":
    main()
