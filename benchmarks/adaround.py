"""What AdaRound's fast form reaches against the paper's at 10,000 iterations, and what each of them costs.

    python -m benchmarks.adaround              # W4A8 on the digits networks; an hour and a half on one core
    python -m benchmarks.adaround resnet18     # ResNet-18, 256 images of 224 px: time and peak memory
    python -m benchmarks.adaround layers [NAME ...] [--threads 1]  # two layers of the larger networks, sgd extrapolated
    python -m benchmarks.adaround show         # the tables of what is recorded

Layers: the first and the middle one, W4A8, 32 samples. What a step of sgd costs is the difference of 25 and 5 steps,
and 10,000 are told; the time of the others holds the passes over the data, which a whole network shares, so that the
ratios are rather too high.

Every finished run is a row of benchmarks/results/adaround.json; a row that is there is not run again, so the program
can be stopped at any time and goes on where it was. A seed chooses the 256 training images that are given and what sgd
draws from them; errors and scores are those of the 597 test images. BatchNorm is folded and ranges are calibrated
before. Seconds are those of the processor, one thread: neighbours disturb them little.
"""

import argparse
import copy
import dataclasses
import json
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qlab
from benchmarks import models
from benchmarks.measuring import Row, exactly, middle, seconds
from benchmarks.models import NAMES
from benchmarks.record import Record

RESULTS = Path(__file__).parent / "results" / "adaround.json"
NETWORKS = {"MobileNet": qlab.examples.mobilenet, "ResNet": qlab.examples.resnet, "ViT": qlab.examples.vit}
METHODS: dict[str, qlab.techniques.Technique | None] = {
    "nearest": None,
    "GPTQ": qlab.GPTQ(),
    "auto": qlab.AdaRound(),
    "gram": qlab.AdaRound(method="gram"),
    "sgd": qlab.AdaRound(method="sgd", iterations=10_000),
}
IMAGES, SEEDS = 256, (0, 1, 2)
STEPS = 10_000
OF_TABLE = {"digits_mobilenet": "MobileNet", "digits_resnet": "ResNet"}


def settings() -> Iterator[tuple[str, str, int, str]]:
    """(network, granularity, seed, method): the quick methods of all settings first, then sgd seed by seed."""
    quick = [method for method in METHODS if method != "sgd"]
    for methods in (quick, ["sgd"]):
        for seed in SEEDS:
            for granularity in ("per_tensor", "per_channel"):
                for network in NETWORKS:
                    for method in methods:
                        yield network, granularity, seed, method


def digits(recorded: dict[str, Any]) -> None:
    """Changes `recorded`: adds the rows that are missing, and writes it after each of them."""
    data = qlab.examples.digits()
    score = qlab.Accuracy(data.test)
    test = torch.cat([x for x, _ in data.test])
    prepared: dict[tuple[str, str, int], tuple[qlab.QuantSim, list[Tensor], Tensor]] = {}
    for network, granularity, seed, method in settings():
        key = {"network": network, "granularity": granularity, "seed": seed, "method": method}
        if any(key.items() <= row.items() for row in recorded["digits"]):
            continue
        at = network, granularity, seed
        if at not in prepared:
            chosen = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
            batches = list(data.train_images[chosen].split(32))
            sim = qlab.QuantSim(
                NETWORKS[network](), batches[0], qlab.presets.w4a8(per_channel=granularity == "per_channel")
            )
            qlab.BatchNormFolding().apply(sim)
            sim.calibrate(batches)
            with torch.no_grad():
                prepared[at] = sim, batches, NETWORKS[network]()(test)
        original, batches, exact = prepared[at]
        sim, forms, technique = copy.deepcopy(original), {}, METHODS[method]
        wall, processor = time.perf_counter(), time.process_time()
        if technique is not None:
            seeded = dataclasses.replace(technique, seed=seed)
            forms = seeded.apply(sim, batches).values["forms"]
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
        measured = sim.evaluate(score)
        row = key | {
            "relative_error": float((sim.output(test) - exact).norm() / exact.norm()),
            "score": float(measured),
            "interval": measured.interval,
            "processor_s": round(processor, 3),
            "wall_s": round(wall, 3),
            "forms": forms,
        }
        recorded["digits"].append(row)
        write(recorded)
        print(row, flush=True)


def resnet18(recorded: dict[str, Any]) -> None:
    """Changes `recorded`: AdaRound of ResNet-18 with 256 images of 224 px of noise, W4A8 per channel."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 3, 224, 224, generator=generator) for _ in range(IMAGES // 16)]
    model = models.warmed_up(models.resnet18(), (8, 3, 224, 224))
    sim = qlab.QuantSim(model, batches[0][:2], qlab.presets.w4a8(per_channel=True))
    qlab.BatchNormFolding().apply(sim)
    sim.calibrate(batches[:2])
    noise = qlab.SQNR(batches[:2])
    before, start = sim.evaluate(noise), peak_bytes()
    wall, processor = time.perf_counter(), time.process_time()
    report = qlab.AdaRound().apply(sim, batches)
    recorded["resnet18"] = {
        "images": IMAGES,
        "layers": len(report.rows),
        "forms": report.values["forms"],
        "processor_s": round(time.process_time() - processor, 1),
        "wall_s": round(time.perf_counter() - wall, 1),
        "peak_MiB": peak_bytes() >> 20,
        "peak_MiB_before": start >> 20,
        "sqnr_before_dB": round(float(before), 2),
        "sqnr_after_dB": round(float(sim.evaluate(noise)), 2),
    }
    write(recorded)
    print(report)
    print(recorded["resnet18"])


def rows_of_digits(recorded: dict[str, Any]) -> dict[str, dict[str, Row]]:
    """What the table shows of the whole digits networks: the time of each form over that of sgd, over all settings."""
    times = {
        tuple(row[key] for key in ("network", "granularity", "seed", "method")): row["processor_s"]
        for row in recorded["digits"]
    }
    found: dict[str, dict[str, Row]] = {}
    for name, network in OF_TABLE.items():
        for method in ("auto", "gram"):
            ratios = [
                times[*key[:3], method] / spent
                for key, spent in times.items()
                if key[0] == network and key[3] == "sgd" and (*key[:3], method) in times
            ]
            if ratios:
                found.setdefault(name, {})[f"AdaRound {method} / sgd, time"] = middle(ratios)
    return found


def layers(name: str) -> dict[str, Row]:
    """The time of each form over that of sgd, of two layers."""
    model, x = models.load(name)
    batches = list(torch.randn(32, *x.shape[1:]).split(4))
    original = qlab.QuantSim(model, batches[0][:2], qlab.presets.w4a8())
    original.calibrate(batches[:1])
    weighted = [layer for layer in original.layers if original[layer].weight is not None]
    chosen = (weighted[0], weighted[len(weighted) // 2])

    def spent(**settings: Any) -> float:
        sim = copy.deepcopy(original)
        return seconds(lambda: qlab.AdaRound(layers=chosen, **settings).apply(sim, batches))

    few, more = spent(method="sgd", iterations=5), spent(method="sgd", iterations=25)
    sgd = more + (STEPS - 25) * max(more - few, 0.0) / 20
    rows = {f"AdaRound {method} / sgd, time": exactly(spent(method=method) / sgd) for method in ("auto", "gram")}
    return rows | {"AdaRound of two layers by sgd, extrapolated, s": exactly(sgd)}


def peak_bytes() -> int:
    """The largest memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def show(recorded: dict[str, Any]) -> None:
    """Prints the tables of what is recorded: means over seeds, and the worst seed of the comparison with sgd."""
    rows = recorded["digits"]
    print(f"W4A8, relative logit error (score, processor seconds), mean of seeds; {IMAGES} images")
    print(f"{'network':22}" + "".join(f"{method:>24}" for method in METHODS))
    for granularity in ("per_tensor", "per_channel"):
        for network in NETWORKS:
            cells = []
            for method in METHODS:
                found = [
                    r for r in rows if (r["network"], r["granularity"], r["method"]) == (network, granularity, method)
                ]
                if not found:
                    cells.append("-")
                    continue
                error, score, seconds = (
                    sum(r[what] for r in found) / len(found) for what in ("relative_error", "score", "processor_s")
                )
                cells.append(f"{error:.4f} ({score:.1%}, {seconds:.1f} s)")
            print(f"{network + ', ' + granularity:22}" + "".join(f"{cell:>24}" for cell in cells))
    print("\nauto against sgd at 10,000 iterations, seed by seed")
    for row in (r for r in rows if r["method"] == "sgd"):
        (auto,) = (
            r for r in rows if r["method"] == "auto" and all(r[k] == row[k] for k in ("network", "granularity", "seed"))
        )
        print(
            f"{row['network']:10} {row['granularity']:12} seed {row['seed']}: error {auto['relative_error']:.4f}, sgd "
            f"{row['relative_error']:.4f}, ratio {auto['relative_error'] / row['relative_error']:.2f}; time 1/"
            f"{row['processor_s'] / auto['processor_s']:.0f}; score {told(auto)} against {told(row)}"
        )
    if "resnet18" in recorded:
        print("\nResNet-18, 224 px:", recorded["resnet18"])


def told(row: dict[str, Any]) -> str:
    """A score with its 95 % interval."""
    low, high = row["interval"]
    return f"{row['score']:.1%} ({low:.1%} to {high:.1%})"


def read() -> dict[str, Any]:
    """What is recorded; with the settings of this run where nothing is."""
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    about = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "images": IMAGES}
    techniques = {name: repr(technique) for name, technique in METHODS.items() if technique is not None}
    return {"settings": about | {"techniques": techniques}, "digits": []}


def write(recorded: dict[str, Any]) -> None:
    """Writes the results, renamed into place, with the rows of the table that follow from them."""
    for name, rows in rows_of_digits(recorded).items():
        mine = recorded.setdefault("rows", {}).setdefault(name, {})
        mine.update({row: {"1": values} for row, values in rows.items()})
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_suffix(".part")
    temporary.write_text(json.dumps(recorded, indent=1) + "\n")
    os.replace(temporary, RESULTS)


def main() -> None:
    """Runs the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="digits", choices=("digits", "resnet18", "layers", "show"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    for flag in ("--keep", "--again"):
        parser.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.part == "layers":
        record = Record("adaround", asked.keep, asked.again)
        for name in asked.names or [name for name in NAMES if name not in OF_TABLE]:
            torch.manual_seed(0)
            if record.lacks(name, asked.threads, "layers"):
                record.add(name, asked.threads, "layers", layers(name))
        return
    found = read()
    {"digits": digits, "resnet18": resnet18, "show": show}[asked.part](found)
    if asked.part == "digits":
        show(found)


if __name__ == "__main__":
    main()
