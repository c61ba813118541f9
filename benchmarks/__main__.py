"""All ratios of the engine in one table.

    python -m benchmarks [NAME ...] [--threads 1 2] [--repeats 7] [--forward] [--compile] [--show]

Names as benchmarks/engine.py takes them; without any, all of them, of the large ones (resnet50, mobilenet_v2, vit_b_16,
bert_base_encoder) the forward pass only. Each model is measured in a process of its own, its rows replace the earlier
ones in benchmarks/results/engine.json, and the whole table is printed. --show prints it without measuring. The other
programs of this folder measure what their first lines say, and print for themselves.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import table

SMALL = ("kernel", "digits_mobilenet", "digits_resnet", "resnet18")
LARGE = ("resnet50", "mobilenet_v2", "vit_b_16", "bert_base_encoder")


def measured(name: str, threads: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The rows of one model, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable, str(Path(__file__).with_name("engine.py")), name, "--json", str(result)]
        command += ["--threads", str(threads), "--repeats", str(options.repeats)]
        command += ["--forward"] if options.forward or (name in LARGE and not options.names) else []
        command += ["--compile"] if options.compile else []
        subprocess.run(command, check=True)
        rows = json.loads(result.read_text())[name]
        if name != "kernel" and threads == 1 and Path("/proc/self/clear_refs").exists():
            subprocess.run([*command, "--memory"], check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
            rows |= json.loads(result.read_text())[name]
        return rows


def main() -> None:
    """Measures what was asked for, keeps it and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    for flag in ("--forward", "--compile", "--show"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    kept = table.read("engine")
    rows = kept.setdefault("rows", {})
    for name in () if options.show else options.names or (*SMALL, *LARGE):
        for threads in options.threads:
            for row, values in measured(name, threads, options).items():
                rows.setdefault(name, {}).setdefault(row, {})[str(threads)] = values
            kept["machine"] = table.machine()
            table.write("engine", kept)
    print("\n".join(table.lines(rows, table.read("aimet").get("rows"))))
    print(f"\nmeasured on {kept.get('machine', 'nothing yet')}")


if __name__ == "__main__":
    main()
