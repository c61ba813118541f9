"""All ratios in one table: measured by the programs of this folder, each in a process of its own.

    python -m benchmarks [SET ...] [--threads 1 2] [--repeats 7] [--again]   # measures what is not there yet
    python -m benchmarks --show      # shows what is there
    python -m benchmarks --readme    # puts it into README.md and docs/benchmarks.md

Sets: digits, resnet18, resnet50, mobilenet_v2, vit_b_16, bert_base_encoder, person (import, first fix, first dashboard
in a browser), growth; without any, all. What was measured on this machine with qlab as it is now is not measured again
unless --again: stop at any time, the same command goes on. AdaRound and AutoQuant of the larger networks are
measured with one thread only.
"""

import argparse
import subprocess
import sys

from benchmarks import table
from benchmarks.models import DIGITS, LARGE, NAMES

SETS = ("digits", *(name for name in NAMES if name not in DIGITS), "person", "growth")


def commands(name: str, threads: list[int], repeats: int) -> list[list[str]]:
    """The programs of a set, with their arguments."""
    if name == "growth":
        return [["growth", "--repeats", "3"]]
    if name == "person":
        few = [["engine", "kernel", "--threads", str(n), "--repeats", str(repeats)] for n in threads]
        return [*few, *(["first_fix", "--threads", str(n)] for n in threads), ["dashboard", "--edits", "200"]]
    models = list(DIGITS) if name == "digits" else [name]
    found = []
    for n in threads:
        end = ["--threads", str(n)]
        found += [
            ["engine", *models, *end, "--repeats", str(repeats)],
            ["qat", "steps", *models, *end, "--repeats", str(repeats)],
            ["analyzer", *models, *end],
        ]
        if n == 1 or name not in LARGE:
            found += [["auto_quant", "total", model, *end] for model in models]  # each from a process that holds little
            found += [] if name == "digits" else [["adaround", "layers", *models, *end]]
    return found


def main() -> None:
    """Measures what was asked for and is not there, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    for flag in ("--again", "--show", "--readme"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    unknown = set(options.sets) - set(SETS)
    if unknown:
        parser.error(f"there is no set {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    failed = []
    for name in () if options.show or options.readme else options.sets or SETS:
        for program, *arguments in commands(name, options.threads, options.repeats):
            command = [sys.executable, "-m", f"benchmarks.{program}", *arguments, "--keep"]
            command += ["--again"] if options.again else []
            if subprocess.run(command).returncode:
                failed.append(" ".join([program, *arguments]))
    print("\n".join(table.lines(table.collected(), table.read("aimet").get("rows", {}))))
    print(f"\n{table.where()}")
    if options.readme:
        for page in table.PAGES:
            before, after = table.placed(page)
            if after != before:
                (table.REPOSITORY / page).write_text(after, encoding="utf-8")
            print(f"{page} is up to date.")
    if failed:
        sys.exit("\n".join(["these did not end well:", *failed]))


if __name__ == "__main__":
    main()
