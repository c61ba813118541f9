"""Runs tutorials and stores their outputs: `python tests/notebooks/refresh.py [NOTEBOOK ...]`, all unless named.

Widget state, timings and progress bars are not stored. Prints what each took; benchmarks/notebooks.py keeps that.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
ASK = """
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""  # KiB on Linux


class Cost(NamedTuple):
    """What a notebook took: seconds on the clock, seconds of processor, the most memory of its kernel."""

    seconds: float
    processor_s: float
    peak_mb: float

    def __str__(self) -> str:
        return f"{self.seconds:6.0f} s, {self.processor_s:4.0f} s of processor {self.peak_mb:6.0f} MB"


def refresh(path: Path, stores: bool = True) -> Cost:
    """Runs one notebook from top to bottom, and writes it back unless told not to."""
    os.environ.update(QLAB_BARS="0", OMP_NUM_THREADS="1")
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    began_s = time.monotonic()
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "store_widget_state": False}
    NotebookClient(notebook, **options, resources={"metadata": {"path": str(path.parent)}}).execute()
    elapsed_s = time.monotonic() - began_s
    processor_s, peak_kib = map(float, notebook.cells.pop().outputs[0].text.split())
    notebook.metadata.pop("widgets", None)
    if stores:
        beside = path.with_name(f".{path.name}.part")
        nbformat.write(notebook, beside)
        beside.replace(path)
    return Cost(elapsed_s, processor_s, peak_kib / 1024)


def main() -> None:
    """Runs those named on the command line, all unless named."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    for path in arguments.parse_args().notebooks:
        sys.stdout.write(f"{path.stem:34}{refresh(path)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
