"""The table of all ratios: what was measured, on which machine, beside what it should be and what others take.

Every program of this folder keeps its rows in a file of results (see `record`); here they are put together, in one
order whoever measured them. `compact` is the choice that README shows, `whole` the page docs/benchmarks.md.
"""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parents[1]
PROGRAMS = ("engine", "qat", "analyzer", "adaround", "auto_quant", "dashboard", "first_fix", "growth")
TITLES = {
    "kernel": "one tensor, and the import",
    "digits_mobilenet": "digits MobileNet (68 k), 64 images of 32 px",
    "digits_resnet": "digits ResNet (69 k), 64 images of 32 px",
    "resnet18": "ResNet-18, 8 images of 224 px",
    "mobilenet_v2": "MobileNetV2, 8 images of 224 px",
    "resnet50": "ResNet-50, 8 images of 224 px",
    "vit_b_16": "ViT-B/16, 8 images of 224 px",
    "bert_base_encoder": "encoder of the size of BERT-base, 8 x 128 tokens",
    "dashboard": "the dashboard of 300 layers, in JupyterLab in Chromium",
    "growth": "a chain of up to 1,000 layers",
}
FORWARD = "sim forward / float forward"
TARGETS = {  # by (model, row): at most this
    ("resnet18", FORWARD): 1.15,
    ("digits_mobilenet", FORWARD): 1.3,
    ("resnet50", FORWARD): 1.10,
    ("mobilenet_v2", FORWARD): 1.10,
    ("vit_b_16", FORWARD): 1.10,
    **{
        ("kernel", f"rounding {how} / ReLU, {size}"): 2.0
        for how in ("a copy", "in place")
        for size in ("6 MB", "26 MB")
    },
    ("kernel", "import beyond import torch, s"): 0.5,
    ("resnet18", "calibrate sqnr / float forwards"): 2.0,
    ("digits_mobilenet", "calibrate sqnr / float forwards"): 4.0,
    ("resnet18", "edit near the output / sim forward"): 0.10,
    ("digits_mobilenet", "training step, regular / float step"): 1.6,
    ("digits_mobilenet", "training step, range learning / float step"): 2.0,
    ("resnet18", "training step, regular / float step"): 1.3,
    ("resnet18", "training step, range learning / float step"): 1.5,
    ("resnet18", "from import to a verified fix, s of the wall"): 60.0,
}
ANY_MODEL = {  # by row, whatever the model
    "analyzer / brute force, forwards": 0.55,
    "analyzer / brute force, time": 0.55,
    "AdaRound auto / sgd, time": 1 / 30,
    "AdaRound gram / sgd, time": 1 / 30,
}
SHOWN = (  # what README shows, of the models below
    FORWARD,
    "calibrate min_max / float forwards",
    "calibrate sqnr / float forwards",
    "edit near the output / sim forward",
    "training step, regular / float step",
    "training step, range learning / float step",
    "analyzer / brute force, time",
    "AdaRound auto / sgd, time",
    "export, s",
    "peak memory, sim forward / float forward",
    "import beyond import torch, s",
    "from import to a verified fix, s of the wall",
    "dashboard there after, ms",
)
SHOWN_MODELS = ("kernel", "digits_mobilenet", "resnet18", "resnet50", "mobilenet_v2", "vit_b_16", "dashboard")
Rows = dict[str, dict[str, dict[str, dict[str, float]]]]
"""Model to row to threads to ratio, low and high."""


def processor() -> str:
    """The processor's name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    return model


def machine() -> dict[str, Any]:
    """Where it was measured, in words that mean something elsewhere."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__, "load": round(load, 1)}


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


def collected() -> Rows:
    """The rows of all programs, models in the order of TITLES."""
    rows: Rows = {model: {} for model in TITLES}
    for program in PROGRAMS:
        for model, found in read(program).get("rows", {}).items():
            rows.setdefault(model, {}).update(found)
    return {model: found for model, found in rows.items() if found}


def lines(rows: Rows, others: Rows, models: tuple[str, ...] = (), names: tuple[str, ...] = ()) -> list[str]:
    """The table as Markdown: model, row, one thread, two threads, target, AIMET; some models and rows where given."""
    chosen = {
        model: {row: found[row] for row in (names or found) if row in found}
        for model, found in rows.items()
        if not models or model in models
    }
    counts = sorted({threads for model in chosen.values() for row in model.values() for threads in row}, key=int)
    others_too = any(row in others.get(model, {}) for model, found in chosen.items() for row in found)
    heads = ["", *(f"{n} thread{'s' if n != '1' else ''}" for n in counts), "at most"]
    heads += ["AIMET 2.42, 1 thread"] if others_too else []
    told = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for model, found in chosen.items():
        if found:
            told.append(f"| **{TITLES.get(model, model)}** |" + " |" * (len(heads) - 1))
        for row, by_threads in found.items():
            target = TARGETS.get((model, row), ANY_MODEL.get(row))
            cells = [row, *(_shown(by_threads.get(n)) for n in counts), "" if target is None else f"{target:.3g}"]
            cells += [_shown(others.get(model, {}).get(row, {}).get("1"))] if others_too else []
            told.append("| " + " | ".join(cells) + " |")
    return told


def compact() -> str:
    """README's choice of rows, with the machine."""
    table = lines(collected(), read("aimet").get("rows", {}), SHOWN_MODELS, SHOWN)
    return "\n".join([*table, "", where()])


def whole() -> str:
    """All rows."""
    return "\n".join([*lines(collected(), read("aimet").get("rows", {})), "", where()])


def where() -> str:
    """The machine of each program, as a sentence."""
    by_machine: dict[str, list[str]] = {}
    for program in (*PROGRAMS, "aimet"):
        about = read(program).get("machine")
        if about:
            words = f"{about['processor']}, {about['cores']} cores, PyTorch {about['torch']}"
            by_machine.setdefault(words, []).append(program)
    if len(by_machine) == 1:
        return f"Measured on {next(iter(by_machine))}."
    return "; ".join(f"{', '.join(programs)}: measured on {words}" for words, programs in by_machine.items()) + "."


PAGES = {"README.md": compact, "docs/benchmarks.md": whole}
BETWEEN = re.compile(r"(<!-- benchmarks -->\n).*?(<!-- end of benchmarks -->)", re.DOTALL)


def placed(page: str) -> tuple[str, str]:
    """(what a page holds, what it should hold): the table stands between two markers."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return text, BETWEEN.sub(lambda found: f"{found[1]}\n{PAGES[page]()}\n\n{found[2]}", text)


def _shown(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    if row["low"] == row["high"]:
        return f"{row['ratio']:.3g}"
    return f"{row['ratio']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
