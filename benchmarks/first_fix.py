"""A person's minute: from `import qlab` to the culprit by name, its cause, and a fix applied and verified.

    python -m benchmarks.first_fix [--threads 1] [--images 256] [--keep]

ResNet-18 at W4A8 on images of noise at 224 px; random weights, BatchNorm statistics that fit them. One block is made
hard on purpose: the channels between its two convolutions are rescaled by factors from 1/16 to 16, which leaves the
float function as it is. What a person would type is in `first_fix`; each step prints its time of the wall and of the
processor. The culprit is found exactly on the first images; what the fix gains is verified on all of them.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

BEGAN = time.perf_counter(), time.process_time()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import qlab  # noqa: E402

IMPORTED = time.perf_counter() - BEGAN[0], time.process_time() - BEGAN[1]

from benchmarks import models  # noqa: E402
from benchmarks.measuring import exactly  # noqa: E402
from benchmarks.record import Record  # noqa: E402

HARD = "layer3.0"
TARGET_S = 60.0
FIRST = 16  # images to find the culprit on


def hard_model() -> nn.Module:
    """ResNet-18 with one block that is hard to quantize."""
    model = models.warmed_up(models.resnet18(), (8, 3, 224, 224))
    block = model.get_submodule(HARD)
    model.set_submodule(HARD, qlab.examples.rescale(block, spread=(1 / 16, 16.0), fold=True))
    return model


@contextmanager
def step(name: str) -> Iterator[None]:
    """Prints how long it took."""
    wall, processor = time.perf_counter(), time.process_time()
    yield
    print(f"  {name:40} {time.perf_counter() - wall:6.1f} s {time.process_time() - processor:6.1f} s", flush=True)


def first_fix(model: nn.Module, batches: list[Tensor]) -> bool:
    """Whether the culprit was found and healed as predicted; prints what was found."""
    few = batches[: FIRST // len(batches[0])]
    with step("capture and calibrate"):
        sim = qlab.QuantSim(model, batches[0], qlab.presets.w4a8())
        sim.calibrate(batches)
    with step("which layer"):
        analysis = qlab.QuantAnalyzer(estimate=False, disabled=False).measure(sim, few)
        culprit = analysis.ranking()[0]
    with step("why, and what would help"):
        found = analysis.diagnose(culprit)
        fix = found.fixes[0]
    with step("verify: before"):
        score = qlab.SQNR(batches)
        before = sim.evaluate(score)
    with step("fix"):
        fix.apply(sim, few)
    with step("verify: after"):
        after = sim.evaluate(score)
    print(f"\n{found}\n\n{fix.label}: predicted {fix.predicted_gain:+.2f} +- {fix.gain_error:.2f} dB on {FIRST} images")
    print(f"verified on {sum(map(len, batches))} images: {before} before, {after} after ({after - before:+.2f} dB)\n")
    return culprit.startswith(HARD) and "range spread" in found.cause and after > before + 1


def main() -> None:
    """Prints the steps and the sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=256)
    for flag in ("--keep", "--again"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    record = Record("first_fix", options.keep, options.again)
    if not record.lacks("resnet18", options.threads, "first fix"):
        return
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model, batches = hard_model(), list(torch.randn(options.images, 3, 224, 224).split(8))
    print(f"ResNet-18 at W4A8, {options.images} images, threads: {options.threads}; wall and processor\n")
    print(f"  {'import torch, import qlab':40} {IMPORTED[0]:6.1f} s {IMPORTED[1]:6.1f} s")
    wall, processor = time.perf_counter(), time.process_time()
    done = first_fix(model, batches)
    wall, processor = time.perf_counter() - wall + IMPORTED[0], time.process_time() - processor + IMPORTED[1]
    print(f"in all {wall:.1f} s of the wall, {processor:.1f} s of the processor; target {TARGET_S:.0f} s")
    if done and options.images == 256:
        found = {"of the wall": wall, "of the processor": processor}
        rows = {f"from import to a verified fix, s {clock}": exactly(value) for clock, value in found.items()}
        record.add("resnet18", options.threads, "first fix", rows)
    print("culprit, cause and fix: " + ("found and verified" if done else "NOT found"))


if __name__ == "__main__":
    main()
