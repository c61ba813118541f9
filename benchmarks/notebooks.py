"""Seconds and peak memory of every tutorial: all together under 12 minutes, each in what Binder gives.

    python benchmarks/notebooks.py [NAME ...] [--show]

Runs them one after the other, a thread each, without storing outputs; names as 12 or 12_transformer. The figures
replace the earlier ones in benchmarks/results/notebooks.json; --show prints those without running. The exit status says
whether the limits hold for what is kept.
"""

import argparse
import runpy
import sys
from pathlib import Path

import table

ROOT = Path(__file__).parents[1]
MOST_S = 12 * 60
MOST_MB = 1800  # Binder promises 2 GB, of which the server takes 200 MB


def main() -> int:
    """Measures what was asked for, keeps it and prints all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    refresh = runpy.run_path(str(ROOT / "tests" / "notebooks" / "refresh.py"))["refresh"]
    notebooks = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    kept = table.read("notebooks")
    rows = {name: row for name, row in kept.get("rows", {}).items() if name in notebooks}
    chosen = [name for name in notebooks if not options.names or name.startswith(tuple(options.names))]
    for name in () if options.show else chosen:
        cost = refresh(notebooks[name], stores=False)
        rows[name] = {key: round(value, 1) for key, value in cost._asdict().items()}
        print(f"{name:34}{cost}", flush=True)
        table.write("notebooks", {"machine": table.machine(), "rows": dict(sorted(rows.items()))})
    if options.show:
        for name, row in rows.items():
            print(
                f"{name:34}{row['seconds']:6.0f} s, {row['processor_s']:4.0f} s of processor {row['peak_mb']:6.0f} MB"
            )
    seconds, processor_s = (sum(row[key] for row in rows.values()) for key in ("seconds", "processor_s"))
    peak_mb = max(row["peak_mb"] for row in rows.values())
    print(f"{len(rows)} tutorials: {seconds:.0f} s (limit {MOST_S}), {processor_s:.0f} s of processor", end="")
    print(f", {peak_mb:.0f} MB at most (limit {MOST_MB})")
    return int(seconds > MOST_S or peak_mb > MOST_MB)


if __name__ == "__main__":
    sys.exit(main())
