"""What quantization-aware training costs a step, and what it reaches on the digits networks.

    python -m benchmarks.qat steps [NAME ...] [--threads 1] [--keep]   # one training step against the float model's
    python -m benchmarks.qat reach [--keep]                            # three epochs against the best without training

Steps: forward, backward and Adam's step in train mode, as training runs, the modes beside the float model in every
repeat: the network as it is, with its BatchNorms, and folded (there the float model is the sim with its quantizers
off). In eval mode, where BatchNorm is cheap, or with plain SGD, which costs next to nothing, the same quantizers would
look dearer. 32 digits, 8 images for ResNet-18, 2 samples for the larger ones. Reach: per tensor,
weights and activations at the same bits, means over seeds of the order of batches. The best without training is the
best (by accuracy, then SQNR) of several range rules and AdaRound on top; rules and rounding are picked on the test
images, which favours them. The interval of a difference is paired: the same images, asked twice.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import qlab
from benchmarks.measuring import Row, interleaved, ratio, training_step
from benchmarks.models import DIGITS, LARGE, NAMES, load
from benchmarks.record import Record

MODES = ("regular", "range_learning")
FOLDED = (*DIGITS, "resnet18")
RULES = (("min_max", "min_max"), ("sqnr", "min_max"), ("sqnr", "sqnr"), ("mse", "mse"))
EPOCHS = 3


def steps(name: str, repeats: int, is_folded: bool) -> dict[str, Row]:
    """The cost of a training step in either mode, relative to the float model's."""
    model, x = load(name)
    x = x[:2] if name in LARGE else x[:32]
    sim = qlab.QuantSim(model, x[:2], qlab.presets.w8a8())
    if is_folded:
        qlab.BatchNormFolding().apply(sim)
    sim.calibrate([x])
    exact = copy.deepcopy(sim)
    exact.quantization_enabled = False
    works = [training_step(exact if is_folded else model, x)]
    for mode in MODES:
        each = copy.deepcopy(sim)
        each.qat(mode)
        works.append(training_step(each, x))
    base, *times = interleaved(repeats, *works)
    end = ", BatchNorm folded in both" if is_folded else ""
    return {
        f"training step, {mode.replace('_', ' ')} / float step{end}": ratio(found, base)
        for mode, found in zip(MODES, times, strict=True)
    }


def networks() -> dict[str, nn.Module]:
    """The networks of the tutorials; the third has its channels at scales of three orders of magnitude."""
    rescaled = qlab.examples.rescale(qlab.examples.mobilenet(), (0.03, 30.0))
    return {
        "MobileNet": qlab.examples.mobilenet(),
        "ResNet": qlab.examples.resnet(),
        "rescaled MobileNet after CLE": rescaled,
    }


def reach(bits: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Accuracy of float, the best without training, and both modes; accuracies in percent, differences in points."""
    digits = qlab.examples.digits()
    for name, model in networks().items():
        sim = qlab.QuantSim(model, digits.test[0], qlab.presets.w4a4())
        sim.configure("*", weight={"bits": bits}, output={"bits": bits})
        sim.calibrate(digits.calibration())
        technique = qlab.CrossLayerEqualization() if "CLE" in name else qlab.BatchNormFolding()
        technique.apply(sim, digits.calibration())
        exact = copy.deepcopy(sim)
        exact.quantization_enabled = False
        start, best, label = without_training(sim)
        found = {"float": [right(exact)], "best without training": [right(best)]}
        sqnr = {"best without training": float(best.evaluate(qlab.SQNR(digits.test)))}
        for mode in MODES:
            trained = []
            for seed in range(seeds):
                each = copy.deepcopy(start)
                qlab.QAT(mode=mode, epochs=EPOCHS, seed=seed).apply(each, digits.train)
                trained.append(each)
            found[mode] = [right(each) for each in trained]
            sqnr[mode] = statistics.mean(float(each.evaluate(qlab.SQNR(digits.test))) for each in trained)
        row: dict[str, Any] = {"network": name, "bits": bits, "without training": label, "seeds": seeds}
        row |= {key: 100 * float(torch.stack(rows).mean()) for key, rows in found.items()}
        row |= {f"{key}, SQNR": value for key, value in sqnr.items()}
        for mode in MODES:
            row[f"{mode} - best"] = difference(found[mode], found["best without training"])
            row[f"{mode} - float"] = difference(found[mode], found["float"])
        row["range_learning - regular"] = difference(found["range_learning"], found["regular"])
        yield row


def without_training(sim: qlab.QuantSim) -> tuple[qlab.QuantSim, qlab.QuantSim, str]:
    """(the best by range rules alone, the best of all, its name)."""
    digits = qlab.examples.digits()

    def quality(each: qlab.QuantSim) -> tuple[float, float]:
        return float(right(each).mean()), float(each.evaluate(qlab.SQNR(digits.test)))

    candidates = {}
    for weights, outputs in RULES:
        twin = copy.deepcopy(sim)
        twin.configure("*", weight={"rule": weights}, output={"rule": outputs})
        candidates[f"{weights} / {outputs}"] = twin
    start = max(candidates, key=lambda name: quality(candidates[name]))
    rounded = copy.deepcopy(candidates[start])
    qlab.AdaRound().apply(rounded, digits.calibration())
    both = {start: candidates[start], f"{start}, AdaRound": rounded}
    best = max(both, key=lambda name: quality(both[name]))
    return candidates[start], both[best], best


def right(sim: qlab.QuantSim) -> Tensor:
    """1 for each test image that is classified as labelled, else 0."""
    digits = qlab.examples.digits()
    return torch.cat([(sim.output(batch).argmax(1) == batch[1]).double() for batch in digits.test])


def difference(a: list[Tensor], b: list[Tensor]) -> dict[str, float]:
    """The mean difference in points and half the width of its 95 % interval, paired by image."""
    each = 100 * (torch.stack(a).mean(0) - torch.stack(b).mean(0))
    return {"points": float(each.mean()), "half_width": 1.96 * float(each.std()) / math.sqrt(len(each))}


def told(row: dict[str, Any]) -> str:
    """A row of `reach` as lines."""
    lines = [f"\n{row['network']}, W{row['bits']}A{row['bits']} per tensor, {row['seeds']} seeds"]
    lines.append(f"  float {row['float']:.1f} %")
    sqnr = row["best without training, SQNR"]
    lines.append(f"  without training {row['best without training']:.1f} %, {sqnr:.1f} dB ({row['without training']})")
    for mode in MODES:
        gains = [f"{row[f'{mode} - {other}'][key]:+.2f}" for other in ("best", "float") for key in ("points",)]
        wide = [f"{row[f'{mode} - {other}']['half_width']:.2f}" for other in ("best", "float")]
        lines.append(
            f"  {mode:15} {row[mode]:.1f} %, {row[f'{mode}, SQNR']:.1f} dB; against the best without training "
            f"{gains[0]} ± {wide[0]} points, against float {gains[1]} ± {wide[1]}"
        )
    both = row["range_learning - regular"]
    lines.append(f"  range learning - regular {both['points']:+.2f} ± {both['half_width']:.2f} points")
    return "\n".join(lines)


def main() -> None:
    """Measures what was asked for, and keeps it when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("steps", "reach"))
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    for flag in ("--keep", "--again"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    record = Record("qat", asked.keep, asked.again)
    if asked.part == "steps":
        for name in asked.names:
            for is_folded in (False, True) if name in FOLDED else (False,):
                torch.manual_seed(0)
                step = f"training step{', folded' if is_folded else ''}"
                if record.lacks(name, asked.threads, step):
                    record.add(name, asked.threads, step, steps(name, asked.repeats, is_folded))
        return
    torch.manual_seed(0)
    record.found["reach"] = []
    for bits in asked.bits:
        for row in reach(bits, asked.seeds):
            record.found["reach"].append(row)
            record.write()
            print(told(row), flush=True)


if __name__ == "__main__":
    main()
