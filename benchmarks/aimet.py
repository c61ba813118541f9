"""The same rows for AIMET, measured the same way: the column beside ours.

    make benchmark-aimet                                                 # in an environment of its own, .aimet
    .aimet/bin/python -m benchmarks.aimet [NAME ...] [--threads 1] [--repeats 7]

Models, batches, clocks and repeats are those of the other programs; models are made ready by AIMET's own preparer where
it can, so that additions are quantized as here. Rules: min_max is `post_training_tf`, sqnr `post_training_tf_enhanced`.
Results go to benchmarks/results/aimet.json; what was measured is not measured again unless --again. torchvision, which
has no build for every torch, is not installed (benchmarks/aimet_names.py).
"""

import argparse
import copy
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine import RESET, UNFRAGMENTED, extra_seconds
from benchmarks.measuring import Row, exactly, interleaved, middle, peak_bytes, ratio, seconds, training_step
from benchmarks.models import DIGITS, LARGE, NAMES, load
from benchmarks.record import Record

import_module("benchmarks.aimet_names")  # before AIMET
IS_THERE = True
try:
    import aimet_torch
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.model_preparer import prepare_model
    from aimet_torch.quantization.base import QuantizerBase
    from aimet_torch.quantsim import QuantizationSimModel
except ImportError:
    IS_THERE = False


class Case:
    """A model, its batch, its sim as AIMET makes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        loaded, self.x = load(name)
        self.model = prepared(loaded)

    @property
    def batches(self) -> list[Tensor]:
        """What calibration takes, as in benchmarks/engine.py."""
        return [self.x] * 8 if self.name in DIGITS else [self.x[:2] if self.name in LARGE else self.x] * 2

    @cached_property
    def sim(self) -> Any:
        """Calibrated by min-max."""
        return simulated(self.model, self.batches)


def prepared(model: nn.Module) -> nn.Module:
    """The model with its functions as modules; as it is where AIMET's preparer refuses it."""
    try:
        return prepare_model(copy.deepcopy(model)).eval()
    except Exception as error:  # noqa: BLE001  it is told, and its additions stay in float
        print(f"  not prepared: {str(error).splitlines()[0]}")
        return model


def simulated(model: nn.Module, batches: list[Tensor], scheme: str = "post_training_tf") -> Any:
    """A sim at W8A8, calibrated."""
    rule = QuantScheme[scheme]
    sim = QuantizationSimModel(model, batches[0][:2], quant_scheme=rule, default_output_bw=8, default_param_bw=8)
    sim.model.eval()
    encode(sim, batches)
    return sim


def encode(sim: Any, batches: list[Tensor]) -> None:
    """Changes `sim`: its encodings, from the batches."""
    sim.compute_encodings(lambda model, _: [model(x) for x in batches], None)


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy with BatchNorm folded."""
    twin = copy.deepcopy(model)
    fold_all_batch_norms(twin, tuple(x.shape), dummy_input=x)
    return twin


@torch.no_grad()
def forward(case: Case, repeats: int) -> dict[str, Row]:
    """As in benchmarks/engine.py."""
    exact, quantized = interleaved(repeats, lambda: case.model(case.x), lambda: case.sim.model(case.x))
    rows = {"sim forward / float forward": ratio(quantized, exact)}
    if any(isinstance(module, nn.BatchNorm2d) for module in case.model.modules()):
        model = folded(case.model, case.x[:2])
        sim = simulated(model, case.batches)
        exact, quantized = interleaved(repeats, lambda: model(case.x), lambda: sim.model(case.x))
        rows["sim forward / float forward, BatchNorm folded in both"] = ratio(quantized, exact)
    return rows


@torch.no_grad()
def calibrate(case: Case, repeats: int) -> dict[str, Row]:
    """As in benchmarks/engine.py; the rules that AIMET has."""
    rows = {}
    for rule, scheme in (("min_max", "post_training_tf"), ("sqnr", "post_training_tf_enhanced")):
        sim = simulated(case.model, case.batches[:1], scheme)
        exact, calibrated = interleaved(
            max(repeats // 2, 2),
            lambda: [case.model(x) for x in case.batches],
            lambda sim=sim: encode(sim, case.batches),
        )
        rows[f"calibrate {rule} / float forwards"] = ratio(calibrated, exact)
    return rows


def training(case: Case, repeats: int) -> dict[str, Row]:
    """As in benchmarks/qat.py."""
    x, rows = case.x[:2] if case.name in LARGE else case.x[:32], {}
    variants = {"": case.model}
    if case.name not in LARGE:
        variants[", BatchNorm folded in both"] = folded(case.model, x)
    for end, model in variants.items():
        works = [training_step(copy.deepcopy(model), x)]
        for learns_ranges in (False, True):
            sim = simulated(model, [x])
            for module in sim.model.modules():
                if isinstance(module, QuantizerBase):
                    module.requires_grad_(learns_ranges)
            works.append(training_step(sim.model, x))
        base, *times = interleaved(repeats, *works)
        for mode, found in zip(("regular", "range learning"), times, strict=True):
            rows[f"training step, {mode} / float step{end}"] = ratio(found, base)
    return rows


def export(case: Case, repeats: int) -> dict[str, Row]:
    """Seconds to write the ONNX file and encodings."""
    with tempfile.TemporaryDirectory() as folder:
        times = [
            seconds(lambda: case.sim.export(folder, "model", dummy_input=case.x[:2])) for _ in range(min(repeats, 3))
        ]
    return {"export, s": middle(times)}


def memory(case: Case, repeats: int) -> dict[str, Row]:
    """Peaks of memory, as in benchmarks/engine.py."""
    x = case.batches[0]
    sim = simulated(case.model, [x[:1]])
    with torch.no_grad():
        base = peak_bytes(lambda: case.model(x))
        calibrated = peak_bytes(lambda: encode(sim, case.batches))
        simulation = peak_bytes(lambda: sim.model(x))
    return {
        "peak memory, float forward, MiB": exactly(base / 2**20),
        "peak memory, calibrate / float forward": exactly(calibrated / base),
        "peak memory, sim forward / float forward": exactly(simulation / base),
    }


STEPS = {"forward": forward, "calibrate": calibrate, "training": training, "export": export, "memory": memory}


def main() -> None:
    """Measures what was asked for, and keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["kernel", *NAMES])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    if not IS_THERE:
        sys.exit("aimet-torch is not installed here: run make benchmark-aimet.")
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(options.threads)
    state = f"aimet-torch {aimet_torch.__version__}, torch {torch.__version__}"
    record, failed = Record("aimet", again=options.again, of=state), []
    for name in options.names:
        torch.manual_seed(0)
        if name == "kernel":
            if options.threads == 1 and record.lacks(name, 1, "import"):
                package = "benchmarks.aimet_names, aimet_torch.quantsim"
                rows = {"import beyond import torch, s": middle([extra_seconds(package) for _ in range(5)])}
                record.add(name, 1, "import", rows)
            continue
        todo = [step for step in options.steps if step != "memory" or (RESET.exists() and options.threads == 1)]
        todo = [step for step in todo if record.lacks(name, options.threads, step)]
        case = Case(name) if todo else None
        for step in todo:
            if step == "memory" and not UNFRAGMENTED.items() <= os.environ.items():
                command = [sys.executable, "-m", "benchmarks.aimet", name, "--steps", "memory"]
                subprocess.run([*command, *(["--again"] if options.again else [])], env=os.environ | UNFRAGMENTED)
                record = Record("aimet", again=options.again, of=state)
                continue
            try:
                record.add(name, options.threads, step, STEPS[step](case, options.repeats))
            except Exception as error:  # noqa: BLE001  one thing that it cannot do leaves a gap in the column
                failed.append(f"{name}, {step}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                print("  " + failed[-1], flush=True)
    if failed:
        print("\n".join(["", "not measured:", *failed]))


if __name__ == "__main__":
    main()
