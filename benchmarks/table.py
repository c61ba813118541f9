"""The table of all ratios: what was measured, on which machine, beside what it should be and what others take."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

# Targets by (model, row): at most this.
TARGETS = {
    ("resnet18", "sim forward / float forward"): 1.15,
    ("digits_mobilenet", "sim forward / float forward"): 1.3,
    ("resnet50", "sim forward / float forward"): 1.10,
    ("mobilenet_v2", "sim forward / float forward"): 1.10,
    ("vit_b_16", "sim forward / float forward"): 1.10,
    ("kernel", "rounding a copy / ReLU"): 2.0,
    ("kernel", "rounding in place / ReLU"): 2.0,
    ("kernel", "import qlab beyond import torch, seconds"): 0.5,
    ("resnet18", "calibrate sqnr, 2 batches / float forwards"): 2.0,
    ("digits_mobilenet", "calibrate sqnr, 8 batches / float forwards"): 4.0,
    ("resnet18", "edit near the output / sim forward"): 0.10,
}


def machine() -> dict[str, Any]:
    """Where it was measured, in words that mean something elsewhere."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {"processor": model, "cores": os.cpu_count(), "torch": torch.__version__, "load": round(load, 1)}


def read(name: str) -> dict[str, Any]:
    """The kept results of that name, empty where there are none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, found: dict[str, Any]) -> None:
    """Keeps results, in place of earlier ones of that name."""
    RESULTS.mkdir(exist_ok=True)
    beside = RESULTS / f".{name}.part"
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(RESULTS / f"{name}.json")


def lines(results: dict[str, Any], others: dict[str, Any] | None = None) -> list[str]:
    """The table as Markdown: model, row, one thread, two threads, target, and the others' ratio where one is known."""
    others = others or {}
    counts = sorted({threads for model in results.values() for row in model.values() for threads in row}, key=int)
    heads = ["model", "row", *(f"{n} thread{'s' if n != '1' else ''}" for n in counts), "at most", "AIMET"]
    rows = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for model, found in results.items():
        for row, by_threads in found.items():
            shown = [_shown(by_threads.get(n)) for n in counts]
            target, other = TARGETS.get((model, row)), others.get(model, {}).get(row)
            told = "" if target is None else f"{target:g}"
            rows.append(f"| {model} | {row} | {' | '.join(shown)} | {told} | {'' if other is None else f'{other:g}'} |")
    return rows


def _shown(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    if row["low"] == row["high"]:
        return f"{row['ratio']:.3g}"
    return f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
