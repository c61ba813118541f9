"""One run of AutoQuant: the stages in order, on a working copy that returns to remembered states.

A stage starts from a finished one, changes the working copy and is scored. What holds a state is kept as a snapshot;
a choice of range rules is only remembered as such, for it costs nothing to make again.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from qlab.analysis.shadow import shadow
from qlab.errors import Cancelled, InputError
from qlab.progress import Progress, publish
from qlab.quantization import Quantizer, RangeRule, WeightQuantizer
from qlab.sim import SQNR, Measurement, PerSample, QuantSim, Snapshot
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation, float_tensors
from qlab.sim.log import LogEntry, Marks
from qlab.techniques.auto_quant_result import AutoQuantResult
from qlab.techniques.batch_norm_folding import BatchNormFolding
from qlab.techniques.cross_layer_equalization import CrossLayerEqualization
from qlab.techniques.mixed_precision import MixedPrecision
from qlab.techniques.stage_store import StageStore, fingerprint, key_of
from qlab.techniques.stages import StageRecord, Steering
from qlab.techniques.technique import Technique

if TYPE_CHECKING:
    from qlab.techniques.auto_quant import AutoQuant

FLOAT, GIVEN, WEIGHTS = "float", "as given", "weights in float"


class _Vetoed(Cancelled):
    """The running stage was vetoed."""


class _OutOfTime(Cancelled):
    """The time budget is spent."""


class _Finished(Exception):
    """Nothing more needs to be tried."""


@dataclass(eq=False)
class _Node:
    """A stage with what is needed to return to its state: a snapshot, rules on its parent, or a file."""

    record: StageRecord
    parent: "_Node | None"
    key: str
    technique: Technique | None = None
    rules: tuple[str, str] | None = None
    snapshot: Snapshot | None = None
    is_candidate: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """What a person may call it."""
        return (self.record.stage, self.record.technique) if self.record.technique else (self.record.stage,)

    def line(self) -> "list[_Node]":
        """The node and all it was built on, itself first."""
        return [self, *(self.parent.line() if self.parent is not None else [])]


class AutoQuantRun:
    """See AutoQuant; `result` does the work. `sim` is copied at once and never changed."""

    def __init__(
        self,
        sim: QuantSim,
        data: Batches,
        evaluation: Evaluation,
        techniques: list[Technique | type[Technique]],
        labelled: Batches | None,
        settings: "AutoQuant",
        steering: Steering,
        store: StageStore,
        progress: Progress,
    ) -> None:
        self.data, self.evaluation, self.labelled = data, evaluation, labelled
        self.settings, self.steering, self.store, self.progress = settings, steering, store, progress
        self.techniques = techniques
        self.sim = deepcopy(sim)
        self.sim.eval()
        self.nodes: list[_Node] = []
        self.records: list[StageRecord] = []
        self.notes: list[str] = []
        self.target: float | None = None
        self.float_score = math.nan
        self.total = self._planned()
        self.started = time.monotonic()
        self._root: Snapshot | None = None
        self._sqnr: SQNR | None = None

    def result(self) -> AutoQuantResult:
        """Runs all stages; the best of them."""
        started, cancelled = time.perf_counter(), False
        try:
            self._search()
        except _Finished:
            pass
        except _OutOfTime:
            self.notes.append(f"the time budget of {self.settings.time_budget_s:g} s is spent.")
        except (Cancelled, KeyboardInterrupt):
            if self.settings.on_cancel == "raise" or self._best() is None:
                raise
            cancelled = True
            self.notes.append("cancelled; this is the best so far.")
        return self._outcome(cancelled, time.perf_counter() - started)

    # The plan ---------------------------------------------------------------------------------------------------------

    def _search(self) -> None:
        key = "" if self.store.folder is None else fingerprint(self.sim, self.data, self.evaluation)
        self._measure_float()
        given = self._begin(key)
        self._weights_in_float(given)
        self._stop_if_done()
        base = self._structural("BatchNormFolding", given, BatchNormFolding(), "folded") or given
        branches = [base]
        self._try_rules(base)
        for technique in self._of_kind(lambda kind: issubclass(kind, CrossLayerEqualization)):
            equalized = self._structural(type(technique).__name__, base, technique, "pairs")
            if equalized is not None:
                branches.append(equalized)
                self._try_rules(equalized)
        for technique in self._of_kind(lambda kind: issubclass(kind, MixedPrecision)):
            self._apply(type(technique).__name__, self._top(1)[0], technique)
        pool = self._top(self.settings.finalists)
        for technique in self._of_kind(_rounds):
            for node in pool:
                name = type(technique).__name__
                self._apply(name if len(pool) == 1 else f"{name} of {node.record.stage}", node, technique)
        for technique in self._of_kind(lambda kind: kind.__name__ == "QAT"):
            self._apply(type(technique).__name__, self._top(1)[0], technique, self.labelled or self.data)

    def _planned(self) -> int:
        """About how many stages there will be, for the progress bar."""
        branches = 1 + len(self._of_kind(lambda kind: issubclass(kind, CrossLayerEqualization)))
        rounding = self.settings.finalists * len(self._of_kind(_rounds))
        rest = len(self.techniques) - (branches - 1) - len(self._of_kind(_rounds))
        return 3 + branches * (1 + len(self.settings.rules)) + rounding + rest

    def _of_kind(self, wanted: Callable[[type[Technique]], bool]) -> list[Technique]:
        found = []
        for item in self.techniques:
            kind = item if isinstance(item, type) else type(item)
            if wanted(kind) and not issubclass(kind, BatchNormFolding):
                found.append(item if isinstance(item, Technique) else self._default(kind))
        return found

    def _default(self, kind: type[Technique]) -> Technique:
        """A technique that was only named: mixed precision keeps the cost that the sim has now."""
        if issubclass(kind, MixedPrecision):
            weights = [q for q in self.sim.quantizers.values() if isinstance(q, WeightQuantizer) and q.enabled]
            numbers = sum(q.weight.numel() for q in weights)
            if numbers:
                mean = sum(q.bits * q.weight.numel() for q in weights) / numbers
                near = range(max(2, math.floor(mean) - 2), min(16, math.ceil(mean) + 4) + 1)
                return kind(bits=tuple(near), budget=mean)
        return kind()

    # Stages -----------------------------------------------------------------------------------------------------------

    def _measure_float(self) -> None:
        """The float score and from it the target; raises InputError where either makes no sense."""
        started, settings, name = time.perf_counter(), self.settings, self.evaluation.name
        if isinstance(self.evaluation, PerSample):
            self._sqnr = SQNR(self.evaluation.batches)
        self.progress.step(0, self.total, FLOAT)
        try:
            self.evaluation.prepare(self.sim)
            score = self.sim.evaluate(self.evaluation, quantized=False)
        except Cancelled:
            raise
        except Exception as error:
            raise InputError(
                f"the score ({name}) failed on the float model: {type(error).__name__}: {error}. There is nothing to "
                "compare with; try it by sim.evaluate(score, quantized=False)."
            ) from error
        if math.isnan(score):
            raise InputError(f"the score ({name}) of the float model is NaN: there is nothing to compare with.")
        self.float_score = float(score)
        if settings.target is not None:
            if settings.target > score:
                raise InputError(
                    f"target={settings.target:g} is above the float model's own score, {score}: quantization cannot "
                    "be expected to gain. Ask for less, or for allowed_drop."
                )
            self.target = settings.target
        elif math.isfinite(score):
            self.target = self.float_score - settings.allowed_drop
        else:
            self.notes.append(f"{name} of the float model has no bound, so there is no target: all stages are tried.")
        reason = "nothing to reach" if self.target is None else f"target {self.target:.4g}"
        self._record(self._scored(StageRecord(FLOAT, None), score, None, started, "reference", reason))

    def _begin(self, key: str) -> _Node:
        """The sim as given, calibrated where it was not."""
        missing = [q for q in self._quantizers() if q.enabled and q.encoding is None]
        if missing:
            self.sim.calibrate(self.data, self._stage_progress(GIVEN))
        self._root = Snapshot(self.sim)
        note = "it was not calibrated; its ranges come from the batches" if missing else ""
        found = self._stage(GIVEN, None, key_of("root", key), lambda progress: note, keeps_file=False)
        assert found is not None
        return found

    def _weights_in_float(self, given: _Node) -> None:
        """Scores the sim with its weights in float: what no weight technique can exceed."""
        if self._has_time():
            started = time.perf_counter()
            record = StageRecord(WEIGHTS, given.record.stage)
            self._enter(given)
            twin = shadow(self.sim)
            for quantizer in twin.quantizers.values():
                if isinstance(quantizer, WeightQuantizer):
                    quantizer.enabled = False
            try:
                score, sqnr = self._measure(twin, self._stage_progress(WEIGHTS))
            except Cancelled:
                raise
            except Exception as error:  # noqa: BLE001  the table shows it
                self._record(replace(record, verdict="failed", reason=_told(error)))
                return
            reason = "what activations alone cost"
            if self.target is not None and not is_reached(score, self.target):
                reason = (
                    f"activations alone miss the target by {self.target - score:.4g}: weight techniques cannot reach it"
                )
                self.notes.append(f"with its weights in float the sim still misses the target: {reason}.")
            self._record(self._scored(record, score, sqnr, started, "reference", reason))

    def _structural(self, name: str, parent: _Node, technique: Technique, counts: str) -> _Node | None:
        """A stage that later ones build on even where it is not better at once; None where it found nothing to do."""
        return self._apply(name, parent, technique, counts=counts)

    def _try_rules(self, parent: _Node) -> None:
        for weights, outputs in self.settings.rules:
            self._enter(parent)
            before = Snapshot(self.sim, weights=False)
            try:
                changed = set_rules(self.sim, weights, outputs)
            except Exception:  # noqa: BLE001  the stage raises it again, and says so
                changed = 1
            before.restore()
            if not changed:
                continue  # these are the parent's own
            name = f"{weights} / {outputs}"
            if isinstance(parent.technique, CrossLayerEqualization):
                name = f"CLE, {name}"
            key = key_of(parent.key, "rules", weights, outputs)

            def work(progress: Progress, pair: tuple[str, str] = (weights, outputs)) -> str:
                set_rules(self.sim, *pair)
                return ""

            self._stage(name, parent, key, work, rules=(weights, outputs), keeps_file=False)

    def _apply(
        self, name: str, parent: _Node, technique: Technique, data: Batches | None = None, counts: str = ""
    ) -> _Node | None:
        """A stage that applies a technique; `counts`: the report's value that is 0 or missing where nothing changed."""

        def work(progress: Progress) -> str:
            score = self.evaluation if technique.needs_score or isinstance(technique, MixedPrecision) else None
            if type(technique).__name__ == "QAT":
                score = self.evaluation
            report = technique.apply(self.sim, data or self.data, score=score, progress=progress)
            if counts and not report.values.get(counts):
                raise _NothingToDo(report.summary)
            return report.summary

        key = key_of(parent.key, repr(technique))
        return self._stage(name, parent, key, work, technique)

    def _stage(
        self,
        name: str,
        parent: _Node | None,
        key: str,
        work: Callable[[Progress], str],
        technique: Technique | None = None,
        rules: tuple[str, str] | None = None,
        keeps_file: bool = True,
    ) -> _Node | None:
        """Runs one stage; None where it was vetoed, failed or found nothing to do."""
        above = None if parent is None else parent.record.stage
        record = StageRecord(name, above, "" if technique is None else type(technique).__name__)
        node = _Node(record, parent, key, technique, rules)
        if self.steering.is_vetoed(*node.names):
            self._record(replace(record, verdict="vetoed", reason="before it started"))
            return None
        if not self._has_time():
            raise _OutOfTime(name)
        publish(self.progress, replace(record, steering=self.steering))
        started, progress = time.perf_counter(), self._stage_progress(*node.names)
        try:
            progress.step(0, 1, "")
            known = self.store.find(key, keeps_file)
            if known is not None:
                node.record = replace(record, **known)
            else:
                if parent is not None:
                    self._enter(parent)
                note = work(progress)
                score, sqnr = self._measure(self.sim, progress)
                node.record = self._scored(record, score, sqnr, started, "effective", note)
                if rules is None:
                    node.snapshot = Snapshot(self.sim)
        except _Vetoed:
            self._record(replace(record, verdict="vetoed", reason="while it ran", seconds=_since(started)))
            return None
        except _NothingToDo as nothing:
            self._record(replace(record, verdict="discarded", reason=str(nothing), seconds=_since(started)))
            return None
        except _OutOfTime:
            self._record(replace(record, verdict="discarded", reason="out of time", seconds=_since(started)))
            raise
        except (Cancelled, KeyboardInterrupt):
            self._record(replace(record, verdict="discarded", reason="cancelled", seconds=_since(started)))
            raise
        except Exception as error:  # noqa: BLE001  the table shows it, and the other stages go on
            self._record(replace(record, verdict="failed", reason=_told(error), seconds=_since(started)))
            return self._unscored(node, parent, technique)
        if known is None:
            kept = {k: v for k, v in asdict(replace(node.record, steering=None)).items() if k in _KEPT}
            self.store.keep(key, kept, self.sim if keeps_file else None)
        self._judge(node)
        self._stop_if_done()
        return node

    def _unscored(self, node: _Node, parent: _Node | None, technique: Technique | None) -> _Node | None:
        """The first stages are built on even where the score failed on them: it may not fail later."""
        if parent is None or isinstance(technique, (BatchNormFolding, CrossLayerEqualization)):
            try:
                if parent is not None:
                    self._enter(parent)
                    assert technique is not None
                    technique.apply(self.sim, self.data)
            except Exception:  # noqa: BLE001  the technique itself failed: there is nothing to build on
                return None
            node.snapshot, node.is_candidate = Snapshot(self.sim), False
            node.record = self.records[-1]
            return node
        return None

    def _judge(self, node: _Node) -> None:
        """Gives a finished stage its verdict and reason, and tells of it."""
        record, best = node.record, self._best()
        told = [record.reason] if record.reason else []
        if isinstance(node.technique, BatchNormFolding):
            verdict = "effective"
            told.append("kept, for targets fold it")
        elif best is None or _rank(record) > _rank(best.record):
            verdict = "effective"
            told += [] if best is None else [f"better than {best.record.stage!r} ({best.record.score:.4g})"]
        else:
            verdict = "discarded"
            told.append(f"no better than {best.record.stage!r} ({best.record.score:.4g})")
        if is_reached(record.score, self.target):
            verdict = "target met"
        if self.steering.is_forced(*node.names):
            verdict = "forced"
        self.nodes.append(node)
        node.record = self._record(replace(record, verdict=verdict, reason="; ".join(told)))

    # Choosing ---------------------------------------------------------------------------------------------------------

    def _pool(self) -> list[_Node]:
        """The candidates that nobody vetoed, of those with the most forced stages behind them."""
        open_ = [n for n in self.nodes if not any(self.steering.is_vetoed(*above.names) for above in n.line())]
        forced = [sum(self.steering.is_forced(*above.names) for above in n.line()) for n in open_]
        return [n for n, count in zip(open_, forced, strict=True) if count == max(forced)]

    def _best(self) -> _Node | None:
        """The best candidate; of equal ones the earlier."""
        return max(self._pool(), key=lambda node: _rank(node.record), default=None)

    def _top(self, count: int) -> list[_Node]:
        """The best states that no rounding was learned for."""
        plain = [n for n in self._pool() if not any(a.technique and _rounds(type(a.technique)) for a in n.line())]
        if not plain:
            plain = list(self._pool()) or self.nodes[:1]
        if not plain:
            raise _Finished
        return sorted(plain, key=lambda node: _rank(node.record), reverse=True)[:count]

    def _stop_if_done(self) -> None:
        best = self._best()
        if not self.settings.stop_at_target or best is None or not is_reached(best.record.score, self.target):
            return
        done = {name for node in self.nodes for name in node.names}
        if not self.steering.forced - done:
            raise _Finished

    def _outcome(self, cancelled: bool, seconds: float) -> AutoQuantResult:
        best = self._best()
        for node in self.nodes:
            if any(self.steering.is_vetoed(*above.names) for above in node.line()) and node.record.verdict != "vetoed":
                node.record = self._record(replace(node.record, verdict="vetoed", reason="after it had run"))
        lineage: list[str] = []
        name, unit = self.evaluation.name, _share(self.float_score)
        if best is not None:
            self._enter(best)
            lineage = [node.record.stage for node in best.line()]
            found = f"{name} {unit(best.record.score)} by {' < '.join(lineage)}"
        else:
            assert self._root is not None
            self._root.restore()
            found = f"no stage could be scored by {name}; this is the sim as given"
        summary = f"{found}; float {unit(self.float_score)}"
        if self.target is not None:
            met = best is not None and is_reached(best.record.score, self.target)
            summary += f", target {unit(self.target)} " + ("met" if met else "missed")
        return AutoQuantResult(
            technique="AutoQuant",
            summary=summary,
            rows=tuple(
                {k: v for k, v in asdict(replace(r, steering=None)).items() if k in _KEPT} for r in self.records
            ),
            notes=tuple(self.notes),
            values={
                "float": self.float_score,
                "target": self.target,
                "score": None if best is None else best.record.score,
            },
            seconds=seconds,
            sim=self.sim,
            best=None if best is None else best.record,
            records=tuple(self.records),
            lineage=tuple(lineage),
            target=self.target,
            float_score=self.float_score,
            score_name=name,
            cancelled=cancelled,
        )

    # Machinery --------------------------------------------------------------------------------------------------------

    def _enter(self, node: _Node) -> None:
        """Changes the working copy to the state of a finished stage."""
        if node.snapshot is not None:
            node.snapshot.restore()
        elif node.rules is not None:
            assert node.parent is not None
            self._enter(node.parent)
            set_rules(self.sim, *node.rules)
        else:
            assert self._root is not None
            if node.parent is None:
                self._root.restore()
            else:
                self._enter(node.parent)
                before = Marks.of(self.sim)
                log = list(self.sim.log)
                self._root.restore()
                self.store.load(node.key, self.sim)
                self.sim.log[:] = [*log, LogEntry(node.technique, self.data.source, None, before, Marks.of(self.sim))]
            node.snapshot = Snapshot(self.sim)

    def _measure(self, sim: QuantSim, progress: Progress) -> tuple[Measurement, float]:
        """Score and SQNR [dB, NaN where there are no outputs], in one pass; raises ValueError where it is NaN."""
        evaluation = self.evaluation
        if not isinstance(evaluation, PerSample):
            score, sqnr = sim.evaluate(evaluation), math.nan
        else:
            rows, noise = [], []
            with sim.evaluating():
                for number, batch in enumerate(evaluation.batches):
                    progress.step(0, 1, f"score, batch {number}")
                    output = sim.output(batch)
                    rows.append(evaluation.tally(sim, number, batch, output))
                    if float_tensors(output) and self._sqnr is not None:
                        noise.append(self._sqnr.tally(sim, number, batch, output))
            score = evaluation.of_tallies(torch.cat(rows))
            sqnr = float(self._sqnr.of_tallies(torch.cat(noise))) if noise and self._sqnr is not None else math.nan
        if math.isnan(score):
            raise ValueError(f"the score ({evaluation.name}) is NaN")
        return score, sqnr

    def _scored(
        self, record: StageRecord, score: Measurement, sqnr: float | None, started: float, verdict: str, reason: str
    ) -> StageRecord:
        low, high = score.interval or (math.nan, math.nan)
        above = next((r.score for r in self.records if r.stage == record.parent), math.nan)
        return replace(
            record,
            score=float(score),
            low=low,
            high=high,
            gain=float(score) - above,
            sqnr=math.nan if sqnr is None else sqnr,
            seconds=_since(started),
            verdict=verdict,
            reason=reason,
        )

    def _record(self, record: StageRecord) -> StageRecord:
        """Keeps a record, in place of an earlier one of the same stage, and tells of it."""
        names = [known.stage for known in self.records]
        if record.stage in names:
            self.records[names.index(record.stage)] = record
        else:
            self.records.append(record)
        publish(self.progress, replace(record, steering=self.steering))
        return record

    def _has_time(self) -> bool:
        budget = self.settings.time_budget_s
        return budget is None or not self.nodes or time.monotonic() - self.started < budget

    def _stage_progress(self, *names: str) -> "_StageProgress":
        return _StageProgress(self, names)

    def _quantizers(self) -> list[Quantizer]:
        return [q for q in self.sim.quantizers.values() if isinstance(q, Quantizer)]


class _StageProgress:
    """The progress of one stage as a part of the whole; ends the stage when it is vetoed or the time is up."""

    def __init__(self, run: AutoQuantRun, names: tuple[str, ...]) -> None:
        self._run, self._names = run, names

    def step(self, done: int, total: int, text: str = "") -> None:
        run = self._run
        if run.steering.is_vetoed(*self._names):
            raise _Vetoed(self._names[0])
        if not run._has_time():
            raise _OutOfTime(self._names[0])
        part = done / total if total else 0.0
        at = min(len(run.records) + part, run.total)
        run.progress.step(round(100 * at), 100 * run.total, f"{self._names[0]}: {text}" if text else self._names[0])

    def publish(self, record: object) -> None:
        publish(self._run.progress, record)


class _NothingToDo(Exception):
    """A technique found nothing to change."""


_KEPT = ("stage", "parent", "technique", "score", "low", "high", "gain", "sqnr", "seconds", "verdict", "reason")


def _rounds(kind: type[Technique]) -> bool:
    """Whether a technique belongs on the finalists: all but those with a place of their own."""
    if issubclass(kind, (BatchNormFolding, CrossLayerEqualization, MixedPrecision)):
        return False
    return kind.__name__ != "QAT"


def _rank(record: StageRecord) -> tuple[float, float]:
    """Score first, then SQNR; what is unknown comes last."""
    return tuple(-math.inf if math.isnan(value) else value for value in (record.score, record.sqnr))  # type: ignore[return-value]


def _share(like: float) -> Callable[[float], str]:
    return (lambda value: f"{value:.2%}") if 0 <= like <= 1 else (lambda value: f"{value:.4g}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _since(started: float) -> float:
    return time.perf_counter() - started


def set_rules(sim: QuantSim, weights: str, outputs: str) -> int:
    """Changes `sim`: the range rules of all quantizers that follow one; returns how many changed."""
    changed = 0
    for quantizer in sim.quantizers.values():
        rule = RangeRule.of(weights if isinstance(quantizer, WeightQuantizer) else outputs)
        held = quantizer.frozen or not quantizer.enabled or quantizer.spec.known_range is not None  # type: ignore[union-attr]
        if not held and quantizer.rule != rule:
            quantizer.rule = rule  # type: ignore[union-attr]
            changed += 1
    return changed


def is_reached(score: float, target: float | None) -> bool:
    """Whether a score is at the target; False for NaN and without a target."""
    return target is not None and not math.isnan(score) and score >= target
