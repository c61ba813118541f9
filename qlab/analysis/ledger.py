"""What the cases of an analysis were found to score so far, and the rows of its tables made from that."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qlab.analysis.cases import Case
from qlab.analysis.divergence import decibel, mean_kl
from qlab.analysis.precision import difference, jackknife, stability
from qlab.errors import Cancelled
from qlab.sim import Evaluation, Measurement, PerSample

FEW_SAMPLES = 30  # fewer say nothing of how stable a ranking is


@dataclass(frozen=True)
class Outcome:
    """What one case gave on some batches.

    first: the number of the first of these batches. rows: tallies of the score, None where it has no sums over samples.
    score: the score itself where there are no rows. divergence: rows of `Divergence`, None where outputs were not
    seen. note: why there is no score.
    """

    case: Case
    first: int
    rows: Tensor | None = None
    score: Measurement | None = None
    divergence: Tensor | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table, with what is known so far; NaN where there is no number, and `note` says why.

    layer, part, mode, bits: which case. score, error: the score and its standard error. change, change_error: against
    the float model ('enabled') or the fully quantized one ('disabled'), paired over samples. sqnr [dB], kl [nats a
    prediction]: of the model's results against the float model's. samples: seen so far.
    """

    layer: str
    part: str
    mode: str
    bits: str
    score: float = math.nan
    error: float = math.nan
    change: float = math.nan
    change_error: float = math.nan
    sqnr: float = math.nan
    sqnr_error: float = math.nan
    kl: float = math.nan
    kl_error: float = math.nan
    samples: int = 0
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What distinguishes the row: a later row with the same key replaces it."""
        return self.layer, self.part, self.mode, self.bits


COLUMNS = tuple(Row.__dataclass_fields__)


@dataclass
class Ledger:
    """Outcomes by case and batch. Batches may arrive in any order; results do not depend on it."""

    evaluation: Evaluation
    outcomes: dict[Case, dict[int, Outcome]] = field(default_factory=dict)
    notes: dict[Case, str] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Changes the ledger: remembers an outcome; parts that another outcome of the same batch knows are kept."""
        known = self.outcomes.setdefault(outcome.case, {})
        before = known.get(outcome.first)
        if before is not None:
            parts = {name: getattr(outcome, name) for name in ("rows", "score", "divergence")}
            kept = {name: getattr(before, name) if value is None else value for name, value in parts.items()}
            outcome = Outcome(outcome.case, outcome.first, **kept, note=outcome.note or before.note)
        known[outcome.first] = outcome
        if outcome.note:
            self.notes[outcome.case] = outcome.note

    def score(self, case: Case) -> Measurement | None:
        """The score of a case on all batches seen; None where it failed or was not measured."""
        if case in self.notes or case not in self.outcomes:
            return None
        rows = self.rows(case)
        if rows is not None and isinstance(self.evaluation, PerSample):
            return self.evaluation.of_tallies(rows)
        return next((o.score for o in self.outcomes[case].values() if o.score is not None), None)

    def rows(self, case: Case) -> Tensor | None:
        """The tallies of a case in the order of batches."""
        return self._joined(case, "rows")

    def row(self, case: Case) -> Row:
        """The line of a case with what is known so far."""
        layer, part = (case.unit.layer, case.unit.part) if case.unit is not None else ("", "")
        found: dict[str, Any] = {"note": self.notes.get(case, "")}
        score = self.score(case)
        if score is not None:
            found |= {"score": float(score), "error": _number(score.standard_error), "samples": score.samples}
            found |= self._change(case, score)
        divergence = self._joined(case, "divergence")
        if divergence is not None and len(divergence):
            found["sqnr"], found["sqnr_error"] = jackknife(decibel, divergence)
            found["kl"], found["kl_error"] = jackknife(mean_kl, divergence)
            found["samples"] = max(found.get("samples", 0), len(divergence))
        return Row(layer, part, case.mode, "" if case.bits is None else str(case.bits), **found)

    def table(self, cases: Iterable[Case]) -> pd.DataFrame:
        """One line for each case, in order."""
        rows = [self.row(case) for case in cases]
        return pd.DataFrame([{name: getattr(row, name) for name in COLUMNS} for row in rows], columns=list(COLUMNS))

    def whole_batches(self, cases: Iterable[Case]) -> int:
        """How many batches, from the first one on, have an outcome for every case."""
        known = [set(self.outcomes.get(case, ())) for case in cases if case not in self.notes]
        both = set.intersection(*known) if known else set()
        return next(number for number in count() if number not in both)

    def keep_first(self, batches: int) -> None:
        """Changes the ledger: forgets what later batches gave."""
        for known in self.outcomes.values():
            for number in [number for number in known if number >= batches]:
                del known[number]

    def stability(self, cases: Iterable[Case], batches: int) -> float:
        """The least `precision.stability` of the rankings by mode and bits on the first batches; NaN where none can be
        made, with few samples above all."""
        assert isinstance(self.evaluation, PerSample)
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for case in cases:
            if case.unit is not None and case not in self.notes:
                parts = [self.outcomes[case][number].rows for number in range(batches)]
                if all(part is not None for part in parts):
                    groups.setdefault((case.mode, case.bits), []).append(torch.cat(parts))
        found = [
            stability(self.evaluation.value, torch.stack(group))
            for group in groups.values()
            if len(group) > 2 and len(group[0]) >= FEW_SAMPLES
        ]
        return min(found) if found and not any(map(math.isnan, found)) else math.nan

    def _change(self, case: Case, score: Measurement) -> dict[str, float]:
        base = self.score(case.baseline) if case.mode != "float" else None
        if base is None:
            return {}
        if isinstance(self.evaluation, PerSample):
            own, others = self.outcomes[case], self.outcomes[case.baseline]
            both = [first for first in sorted(own) if first in others]  # while batches arrive, one may be ahead
            sides = [[side[first].rows for first in both] for side in (own, others)]
            if any(rows is None for side in sides for rows in side) or not both:
                return {}
            change, error = difference(self.evaluation.value, *(torch.cat(side) for side in sides))
            return {"change": change, "change_error": error}
        change = float(score) - float(base)
        errors = [_number(score.standard_error), _number(base.standard_error)]
        return {"change": change if math.isfinite(change) else math.nan, "change_error": math.hypot(*errors)}

    def _joined(self, case: Case, name: str) -> Tensor | None:
        known = self.outcomes.get(case, {})
        parts = [getattr(known[first], name) for first in sorted(known)]
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present and len(present) == len(parts) else None


def scored(case: Case, first: int, score: Any, divergence: Tensor | None = None) -> Outcome:
    """The outcome of calling `score`, which returns tallies or a Measurement; an error becomes the note."""
    try:
        found = score()
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001  the row shows it to the person, and the other layers go on
        text = f"the score raised {type(error).__name__}: {error}"
        return Outcome(case, first, divergence=divergence, note=text)
    if isinstance(found, Measurement):
        note = "the score is not a number" if math.isnan(found) else ""
        return Outcome(case, first, score=found, divergence=divergence, note=note)
    note = "the score is not a number" if bool(torch.isnan(found).any()) else ""
    return Outcome(case, first, rows=found, divergence=divergence, note=note)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
