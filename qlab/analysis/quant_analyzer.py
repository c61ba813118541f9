"""QuantAnalyzer: which layer is to blame, measured exactly, estimated, and with the error of every number.

The sim is left exactly as it was, because all the switching is done on a shadow of it.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from glob import escape
from itertools import chain, islice
from typing import Any

import pandas as pd
import torch

from qlab.analysis.analysis import Analysis
from qlab.analysis.bits import Bits
from qlab.analysis.cases import MODES, SUMMARY, Case, cases_of
from qlab.analysis.distributions import channel_ranges, histograms
from qlab.analysis.estimate import ESTIMATE_COLUMNS, estimate_sensitivity
from qlab.analysis.freshness import Fingerprint
from qlab.analysis.layer_noise import layer_noise
from qlab.analysis.ledger import Ledger, Outcome, Row
from qlab.analysis.plan import Plan
from qlab.analysis.shadow import require_calibrated, shadow
from qlab.analysis.sweep import Sweep
from qlab.analysis.tasks import Piece, on_workers, run_piece
from qlab.analysis.units import Unit, chosen_units, units_of
from qlab.errors import InputError
from qlab.progress import Progress, Silent
from qlab.settings import check, setting
from qlab.sim import SQNR, Batches, Evaluation, PerSample, QuantSim, evaluation_of
from qlab.sim.workers import Workers


@dataclass(frozen=True)
class QuantAnalyzer:
    """Scores a sim with only one layer quantized and with all but one, and says how noisy and how sensitive each is."""

    bits: str | int | Sequence[Any] | None = setting(
        None, "widths to try for every layer: as set now, or 4, 8, W4A8; several with commas between"
    )
    layers: str | Sequence[str] | None = setting(None, "which layers get a row: globs, comma separated; all when empty")
    by: str = setting("layer", "a row for each layer, or for each weight and output", choices=("layer", "quantizer"))
    enabled: bool = setting(True, "score with only this layer quantized")
    disabled: bool = setting(True, "score with all but this layer quantized")
    summary: bool = setting(True, "score with weights alone, activations alone and all quantized")
    estimate: bool = setting(True, "estimate every layer at several widths and granularities from one pass")
    estimate_bits: str | int | Sequence[Any] = setting("4, 8", "widths of the estimate, beside those above")
    probes: int = setting(2, "random directions of the estimate: more are surer and slower", minimum=1, maximum=64)
    probe_batches: int = setting(8, "batches for the estimate and for the noise of layers", minimum=1)
    stop_when_stable: float | None = setting(
        None,
        "stop reading batches when resampling the samples gives rankings that correlate at least so much; empty: never",
        minimum=0.0,
        maximum=1.0,
    )
    max_bytes: int = setting(1 << 30, "memory for remembered values", minimum=0, unit="bytes")
    seed: int = setting(0, "of the estimate's directions")

    def __post_init__(self) -> None:
        check(self)
        Bits.several(self.bits)
        Bits.several(self.estimate_bits)

    def measure(
        self,
        sim: QuantSim,
        batches: Any,
        score: "Evaluation | Callable[[Any], Any] | None" = None,
        progress: Progress | None = None,
        executor: Executor | None = None,
        on_row: Callable[[Row], None] | None = None,
        **settings: Any,
    ) -> Analysis:
        """The analysis of `sim`, which is not changed.

        batches: any iterable of inputs, for the noise of layers, the estimate, and later diagnoses. score: what the
        sweeps measure, on its own data: an Evaluation, or any function of a model; SQNR on `batches` when None. Scores
        that see outputs (all Evaluations of qlab) are swept by suffixes; a function calls the whole model each time.
        executor: spreads the sweeps over its workers (concurrent.futures, dask). on_row: called with every row when it
        is first known and whenever more samples make it surer. settings: of this object, for this call.

        Raises NotCalibrated, UnknownLayer or InputError before anything is computed, and Cancelled where `progress`
        says so. A score that fails for one layer is told in that layer's row.
        """
        analyzer = dataclasses.replace(self, **settings)
        rows = analyzer._started(sim, batches, score, progress, executor, tells=on_row is not None)
        while True:
            try:
                row = next(rows)
            except StopIteration as end:
                return end.value
            if on_row is not None:
                on_row(row)

    def measure_rows(
        self,
        sim: QuantSim,
        batches: Any,
        score: "Evaluation | Callable[[Any], Any] | None" = None,
        progress: Progress | None = None,
        executor: Executor | None = None,
        **settings: Any,
    ) -> Generator[Row, None, Analysis]:
        """As `measure`, one row after the other; a row replaces an earlier one with the same key. Returns the Analysis
        (`analysis = yield from ...`, or the value of StopIteration)."""
        return dataclasses.replace(self, **settings)._started(sim, batches, score, progress, executor, tells=True)

    def update(
        self,
        analysis: Analysis,
        sim: QuantSim,
        batches: Any,
        score: "Evaluation | Callable[[Any], Any] | None" = None,
        progress: Progress | None = None,
        executor: Executor | None = None,
    ) -> Analysis:
        """`analysis` with the rows measured again that an edit of `sim` made old, each with only its layer quantized.

        Give it what `measure` was given. Rows of other layers still hold, and are not measured; what does not hold says
        so in its note (see `Analysis.updated`). Where weights changed, all is measured again.
        """
        changed = analysis.changed_units(sim)
        if not changed:
            return analysis
        again = dataclasses.replace(self, bits=analysis.bits)
        if len(changed) == len(analysis.units):
            return again.measure(sim, batches, score, progress, executor)
        known = {(unit.layer, unit.part) for unit in units_of(sim, self.by)}
        off = [unit for unit in changed if (unit.layer, unit.part) not in known]
        if off:
            analysis = analysis.switched_off(off, Fingerprint.of(sim, off))
        names = [escape(unit.layer) for unit in changed if unit not in off]
        if not names:
            return analysis
        part = dataclasses.replace(again, layers=names, disabled=False, summary=False, estimate=False)
        return analysis.updated(part.measure(sim, batches, score, progress, executor))

    def _started(
        self,
        sim: QuantSim,
        batches: Any,
        score: "Evaluation | Callable[[Any], Any] | None",
        progress: Progress | None,
        executor: Executor | None,
        tells: bool,
    ) -> Generator[Row, None, Analysis]:
        """See `measure_rows`; tells: yield rows at all, which nobody may be waiting for."""
        sim.graph.require_edges("QuantAnalyzer")
        require_calibrated(sim)
        data = Batches(batches)
        probe = list(islice(data, self.probe_batches))
        if not probe:
            raise InputError("an analysis needs at least one batch; the iterable was empty.")
        everything = units_of(sim, self.by)
        if not everything:
            raise InputError("every quantizer is switched off: there is nothing to analyse.")
        units = chosen_units(everything, sim, self.layers or None)
        judge = SQNR(data) if score is None else evaluation_of(score)
        return self._rows(sim, probe, judge, units, progress or Silent(), executor, tells)

    def _rows(
        self,
        sim: QuantSim,
        probe: list[Any],
        judge: Evaluation,
        units: list[Unit],
        progress: Progress,
        executor: Executor | None,
        tells: bool,
    ) -> Generator[Row, None, Analysis]:
        began = time.perf_counter()
        bits = Bits.several(self.bits)
        cases = cases_of(units, bits, [mode for mode in MODES if getattr(self, mode)], self.summary)
        sweep = Sweep(sim, cases, self.max_bytes)
        plan = Plan(judge, cases, probe, is_shared=executor is not None)
        steps = _Steps(progress, plan.steps + len(probe) * (1 + self.estimate))
        notes: list[str] = []
        with torch.no_grad():
            judge.prepare(sweep.sim)
        noise = layer_noise(shadow(sim), probe, steps)
        estimate = self._estimate(sim, probe, bits, steps, notes)
        fingerprint = Fingerprint.of(sim, units)
        ledger, stopper = Ledger(judge), _Stopper(self.stop_when_stable, cases)
        workers = None if executor is None else Workers(executor, sweep)
        pieces = plan.pieces(sweep.sim)
        found = _serial(sweep, pieces) if workers is None else on_workers(workers, sweep, pieces, steps.look)
        for outcome in chain.from_iterable(found):
            steps.count(str(outcome.case))
            ledger.add(outcome)
            if outcome.case == Case("float") and outcome.note:
                raise InputError(f"{judge.name} cannot be measured on the float model: {outcome.note}.")
            if tells:
                yield ledger.row(outcome.case)
            if stopper.stops(ledger):
                break
        found.close()
        if stopper.batches is not None:
            ledger.keep_first(stopper.batches)
            notes.append(f"stopped after {stopper.batches} batches: the ranking is stable.")
        if workers is not None and workers.lost:
            notes.append(f"{workers.lost} pieces of work were lost by workers and were computed here: {workers.reason}")
        if ledger.notes:
            notes.append(f"{len(ledger.notes)} cases have no score; their rows say why.")
        samples = ledger.row(Case("float")).samples
        return Analysis(
            score_name=judge.name,
            score_unit=getattr(ledger.score(Case("float")), "unit", ""),
            units=tuple(units),
            bits=tuple(map(str, bits)),
            summary=ledger.table(case for case in cases if case.mode in SUMMARY),
            enabled=ledger.table(case for case in cases if case.mode == "enabled"),
            disabled=ledger.table(case for case in cases if case.mode == "disabled"),
            noise=_with_units(noise, units),
            ranges=channel_ranges(sim),
            histograms=histograms(sim),
            estimate=estimate,
            work=sweep.work,
            brute_force=plan.brute_force(len(sim.graph), ledger),
            samples=samples,
            seconds=time.perf_counter() - began,
            notes=tuple(notes),
            fingerprint=fingerprint,
            sim=sim,
            batches=tuple(probe),
        )

    def _estimate(
        self, sim: QuantSim, probe: list[Any], bits: Sequence[Bits], steps: "_Steps", notes: list[str]
    ) -> pd.DataFrame:
        if not self.estimate:
            return pd.DataFrame(columns=list(ESTIMATE_COLUMNS))
        asked = (width for pair in (*bits, *Bits.several(self.estimate_bits)) for width in (pair.weight, pair.output))
        widths = sorted({width for width in asked if width is not None})
        try:
            return estimate_sensitivity(sim, probe, widths, self.probes, self.max_bytes, self.seed, steps)
        except RuntimeError as error:  # what autograd says of an operator without derivative
            notes.append(f"there is no estimate: {str(error).splitlines()[0]}")
            return pd.DataFrame(columns=list(ESTIMATE_COLUMNS))


class _Stopper:
    """Decides when to stop: at the first number of batches whose ranking is stable, in whatever order they come."""

    def __init__(self, level: float | None, cases: Sequence[Case]) -> None:
        self.batches: int | None = None
        self._level, self._cases, self._looked_at = level, list(cases), 0

    def stops(self, ledger: Ledger) -> bool:
        if self._level is None or not isinstance(ledger.evaluation, PerSample):
            return False
        whole = ledger.whole_batches(self._cases)
        while self._looked_at < whole:
            self._looked_at += 1
            if ledger.stability(self._cases, self._looked_at) >= self._level:
                self.batches = self._looked_at
                return True
        return False


class _Steps:
    """Counts the steps of an analysis, those of its parts among them; a Progress for the parts."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done, self._text = progress, total, 0, ""

    def step(self, done: int, total: int, text: str = "") -> None:
        """One step of a part."""
        self.count(text)

    def count(self, text: str) -> None:
        self._text = text
        self._progress.step(self._done, max(self._total, self._done + 1), text)
        self._done += 1

    def look(self) -> None:
        """A chance to cancel while nothing new is known."""
        self._progress.step(self._done, max(self._total, self._done), self._text)


def _serial(sweep: Sweep, pieces: Iterator[Piece]) -> Generator[list[Outcome], None, None]:
    for piece in pieces:
        for outcome in run_piece(sweep, piece):
            yield [outcome]


def _with_units(noise: pd.DataFrame, units: Sequence[Unit]) -> pd.DataFrame:
    """The table with a column `unit`: the row of the other tables that a layer belongs to, '' where it has none."""
    row = {layer: unit.layer for unit in units for layer in unit.layers}
    return noise.assign(unit=[row.get(layer, "") for layer in noise.layer])
