"""Runs tutorials and stores their outputs: `python tests/notebooks/refresh.py [NOTEBOOK ...]`, all unless named.

Prints the seconds and the peak memory of each kernel, and fails where one needs more than Binder gives. Widget state,
timings and progress bars are not stored.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
MOST_MB = 1800  # Binder promises 2 GB, of which the server takes 200 MB
ASK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # KiB on Linux


def refresh(path: Path, stores: bool) -> tuple[float, float]:
    """Runs one notebook from top to bottom and writes it back; seconds and peak megabytes."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    began_s = time.monotonic()
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "store_widget_state": False}
    NotebookClient(notebook, **options, resources={"metadata": {"path": str(path.parent)}}).execute()
    elapsed_s = time.monotonic() - began_s
    peak_mb = int(notebook.cells.pop().outputs[0].text) / 1024
    notebook.metadata.pop("widgets", None)
    if stores:
        beside = path.with_name(f".{path.name}.part")
        nbformat.write(notebook, beside)
        beside.replace(path)
    return elapsed_s, peak_mb


def main() -> int:
    """Runs those named on the command line; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    arguments.add_argument("--measure", action="store_true", help="print, and store nothing")
    chosen = arguments.parse_args()
    os.environ.update(QLAB_BARS="0", OMP_NUM_THREADS="1")
    total_s, largest_mb = 0.0, 0.0
    for path in chosen.notebooks:
        elapsed_s, peak_mb = refresh(path, stores=not chosen.measure)
        total_s, largest_mb = total_s + elapsed_s, max(largest_mb, peak_mb)
        sys.stdout.write(f"{path.stem:34}{elapsed_s:6.0f} s {peak_mb:6.0f} MB\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen.notebooks)} notebooks{total_s:28.0f} s {largest_mb:6.0f} MB at most\n")
    return int(largest_mb > MOST_MB)


if __name__ == "__main__":
    sys.exit(main())
