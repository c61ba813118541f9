"""What a program has measured, kept after every step in benchmarks/results, so that it goes on where it was stopped.

A step is done when it was measured on this machine with qlab as it is now; a changed qlab is measured anew. All files
have the same part `rows`: {model: {row: {threads: {ratio, low, high}}}}, from which `table` makes the one table.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch

import qlab
from benchmarks import table
from benchmarks.measuring import Row


class Record:
    """The results of one program. keep: whether anything is written; again: whether what is done counts as not done;
    of: the state of what is measured, that of qlab when None."""

    def __init__(self, name: str, keep: bool = True, again: bool = False, of: str | None = None) -> None:
        self.name, self._keeps, self._again, self._of = name, keep, again, of or state_of_code()
        self.found = table.read(name) if keep else {}

    def lacks(self, model: str, threads: int, step: str) -> bool:
        """Whether the step is still to be measured; says so where it is not."""
        done = self._done.get(_key(model, threads, step), {}).get("of") == self._of
        if done and not self._again:
            print(f"{model}, {step}, threads: {threads}: measured before")
        return self._again or not done

    def add(self, model: str, threads: int, step: str, rows: dict[str, Row]) -> None:
        """Prints the rows of a step, and keeps them in place of those it had."""
        for row, values in rows.items():
            print(
                f"  {model:18} {row:58} {values['ratio']:8.3g}   {values['low']:.3g} to {values['high']:.3g}",
                flush=True,
            )
        mine = self.found.setdefault("rows", {}).setdefault(model, {})
        key = _key(model, threads, step)
        for row in self._done.get(key, {}).get("rows", ()):
            mine.get(row, {}).pop(str(threads), None)
        for row, values in rows.items():
            mine.setdefault(row, {})[str(threads)] = {name: _short(value) for name, value in values.items()}
        self.found["rows"][model] = {row: by_threads for row, by_threads in mine.items() if by_threads}
        self._done[key] = {"of": self._of, "rows": list(rows)}
        self.write()

    def write(self) -> None:
        """Keeps what is in `found`, with the machine it was measured on."""
        if self._keeps:
            self.found["machine"] = table.machine()
            table.write(self.name, self.found)

    @property
    def _done(self) -> dict[str, Any]:
        return self.found.setdefault("done", {})


@functools.cache
def state_of_code() -> str:
    """What a measurement depends on, in twelve letters: qlab's sources, torch and the processor."""
    sources = sorted(Path(qlab.__file__).parent.rglob("*.py"))
    about = "\n".join([torch.__version__, table.processor(), *(path.read_text(encoding="utf-8") for path in sources)])
    return hashlib.sha256(about.encode()).hexdigest()[:12]


def _key(model: str, threads: int, step: str) -> str:
    return f"{model}, {step}, {threads}"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
