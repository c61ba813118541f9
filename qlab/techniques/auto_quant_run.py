"""One run of AutoQuant: which stages there are, in which order, and what each is told of itself.

A stage starts from a finished one, changes the working copy and is scored.
"""

import math
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from qlab.analysis.shadow import shadow
from qlab.errors import Cancelled, InputError
from qlab.graph.findings import Findings
from qlab.progress import Progress, publish
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim import Measurement, QuantSim, Snapshot
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation
from qlab.sim.files import load_state
from qlab.techniques.auto_quant_model import Admitted
from qlab.techniques.auto_quant_result import AutoQuantResult
from qlab.techniques.batch_norm_folding import BatchNormFolding
from qlab.techniques.cross_layer_equalization import CrossLayerEqualization
from qlab.techniques.mixed_precision import MixedPrecision
from qlab.techniques.qat import QAT
from qlab.techniques.stage_scores import Scores
from qlab.techniques.stage_store import StageStore, fingerprint, key_of
from qlab.techniques.stage_tree import Stage, StageTree, rule_changes, set_rules
from qlab.techniques.stages import StageRecord, Steering
from qlab.techniques.stages_ahead import StagesAhead
from qlab.techniques.technique import Technique

if TYPE_CHECKING:
    from qlab.techniques.auto_quant import AutoQuant

VALIDATE, FLOAT, GIVEN, WEIGHTS = "validate", "float", "as given", "weights in float"
_ENDED = ("out of time", "cancelled")
_FOLDERS = ("cache_dir", "checkpoint_dir")
_NOTHING_DONE = {BatchNormFolding: "folded", CrossLayerEqualization: "pairs"}  # the value that is 0 or missing then


class _Vetoed(Cancelled):
    """The running stage was vetoed."""


class _OutOfTime(Cancelled):
    """The time budget is spent."""


class _Finished(Exception):
    """Nothing more needs to be tried."""


class _NothingToDo(Exception):
    """A technique found nothing to change."""


class _BrokenProgress(BaseException):
    """The progress raised: no stage's fault, so that none may take it for its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


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
        store: StageStore,
        progress: Progress,
    ) -> None:
        self.data, self.labelled, self.settings = data, labelled, settings
        self.steering: Steering = settings.steering or Steering()
        self.steering.add(settings.veto, settings.force)
        self.store, self.progress = store, progress
        self.sim = deepcopy(sim)
        self.sim.eval()
        self.scores = Scores(evaluation)
        self.tree = StageTree(self.sim, self.steering, store, data.source, settings.within_error)
        self.ahead = StagesAhead(settings.executor)
        self.techniques = [t if isinstance(t, Technique) else _default(t, self.sim, store) for t in techniques]
        self.techniques = [
            replace(t, executor=settings.executor) if isinstance(t, MixedPrecision) and t.executor is None else t
            for t in self.techniques
        ]
        self.records: list[StageRecord] = []
        self.notes: list[str] = []
        self.target: float | None = None
        self.float_score = math.nan
        self.findings: Findings | None = None
        self.total, self.reached = self._planned(), 0
        self._ended_early = False
        self._started = time.perf_counter()

    def validated(self, admitted: Admitted, seconds: float) -> None:
        """Records what the validator said of the model and whether a copy was prepared, as the first stage."""
        self.findings = admitted.findings
        self.notes += [admitted.note] if admitted.note else []
        self._record(StageRecord(VALIDATE, None, seconds=seconds, verdict="reference", reason=admitted.reason))

    def result(self) -> AutoQuantResult:
        """Runs all stages; the best of them."""
        cancelled = False
        try:
            self._search()
        except _Finished:
            pass
        except _OutOfTime:
            self._ended_early = True
            self.notes.append(f"the time budget of {self.settings.time_budget_s:g} s is spent.")
        except _BrokenProgress as broken:
            raise broken.error from None
        except (Cancelled, KeyboardInterrupt):
            if self.settings.on_cancel == "raise" or self.tree.best() is None:
                raise
            cancelled = self._ended_early = True
            self.notes.append("cancelled; this is the best so far.")
        finally:
            self.ahead.close()
        return self._outcome(cancelled)

    # The plan ---------------------------------------------------------------------------------------------------------

    def _search(self) -> None:
        self._set_target()
        self.ahead.share(self.scores, self.data)
        given = self._as_given()
        self._weights_in_float(given)
        base = self._apply("BatchNormFolding", given, BatchNormFolding()) or given
        self._try_rules(base)
        for technique in self._each(CrossLayerEqualization):
            equalized = self._apply(_name(technique), base, technique)
            if equalized is not None:
                self._try_rules(equalized)
        for technique in self._each(MixedPrecision):
            for stage in self.tree.top(1, _is_rounding):
                self._apply(_name(technique), stage, technique)
        finalists = self.tree.top(self.settings.finalists, _is_rounding)
        rounding = list(filter(_is_rounding, self.techniques))
        self._send_ahead([(key_of(s.key, _identity(t)), s, t) for t in rounding for s in finalists])
        for technique in rounding:
            for stage in finalists:
                name = _name(technique) if len(finalists) == 1 else f"{_name(technique)} of {stage.record.stage}"
                self._apply(name, stage, technique)
        for technique in self._each(QAT):
            for stage in self.tree.top(1, _is_rounding):
                self._apply(_name(technique), stage, technique, self.labelled)

    def _each(self, kind: type[Technique]) -> list[Technique]:
        return [technique for technique in self.techniques if isinstance(technique, kind)]

    def _planned(self) -> int:
        """About how many stages there will be, for the progress bar."""
        branches = 1 + len(self._each(CrossLayerEqualization))
        rounding = len(list(filter(_is_rounding, self.techniques)))
        once = len(self._each(MixedPrecision)) + len(self._each(QAT))
        return 3 + branches * (1 + len(self.settings.rules)) + rounding * self.settings.finalists + once

    # Stages -----------------------------------------------------------------------------------------------------------

    def _set_target(self) -> None:
        """Scores the float model; raises InputError where that or the target makes no sense."""
        started, wanted = time.perf_counter(), self.settings.target
        self._progress(FLOAT).step(0, 1)
        score = self.scores.float_score(self.sim)
        self.float_score = float(score)
        if wanted is not None and wanted > score:
            raise InputError(
                f"target={wanted:g} is above the float model's own score, {score}: quantization cannot be expected to "
                "gain. Ask for less, or for allowed_drop."
            )
        if wanted is not None or math.isfinite(score):
            self.target = wanted if wanted is not None else self.float_score - self.settings.allowed_drop
            reason = f"target {self.target:.4g}"
        else:
            reason = f"{self.scores.name} has no bound in float: there is no target, all stages are tried"
        self._record(self._scored(StageRecord(FLOAT, None), score, math.nan, started, "reference", reason))

    def _as_given(self) -> Stage | None:
        """The sim as given, calibrated where it was not."""
        note = ""
        if any(isinstance(q, Quantizer) and q.enabled and q.encoding is None for q in self.sim.quantizers.values()):
            self.sim.calibrate(self.data, self._progress(GIVEN))
            self.tree.begin()
            note = "its ranges come from the batches, for it was not calibrated"
        key = ""
        if self.store.folder is not None:
            key = fingerprint(self.sim, chain(self.data, self.labelled or ()), self.scores.evaluation)
        return self._stage(Stage(StageRecord(GIVEN, None), None, key_of("begin", key)), lambda _: note)

    def _weights_in_float(self, given: Stage | None) -> None:
        """Scores the sim with its weights in float: what no technique for weights alone can exceed."""
        started, progress = time.perf_counter(), self._progress(WEIGHTS)
        record = StageRecord(WEIGHTS, None if given is None else GIVEN)
        self.tree.enter(given)
        twin = shadow(self.sim)
        for quantizer in twin.quantizers.values():
            if isinstance(quantizer, WeightQuantizer):
                quantizer.enabled = False
        try:
            score, sqnr = self.scores.of(twin, progress)
        except _Vetoed:
            self._record(replace(record, verdict="vetoed"))
            return
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001  the table shows it
            self._record(replace(record, verdict="failed", reason=_told(error)))
            return
        reason = "what activations alone cost"
        if self.target is not None and score < self.target:
            reason = (
                f"activations alone miss the target by {self.target - score:.4g}: techniques for weights alone cannot "
                "reach it"
            )
        self._record(self._scored(record, score, sqnr, started, "reference", reason))

    def _try_rules(self, parent: Stage | None) -> None:
        equalized = parent is not None and isinstance(parent.technique, CrossLayerEqualization)
        above = "" if parent is None else parent.key
        if self.ahead.is_on:
            self.tree.enter(parent)
            pairs = [rules for rules in self.settings.rules if rule_changes(self.sim, *rules)]
            self._send_ahead([(key_of(above, "rules", *rules), parent, rules) for rules in pairs])
        for weights, outputs in self.settings.rules:
            self.tree.enter(parent)
            if not rule_changes(self.sim, weights, outputs):
                continue  # the parent has these rules
            name = f"CLE, {weights} / {outputs}" if equalized else f"{weights} / {outputs}"
            record = StageRecord(name, GIVEN if parent is None else parent.record.stage)
            key = key_of("" if parent is None else parent.key, "rules", weights, outputs)
            self._stage(Stage(record, parent, key, rules=(weights, outputs)), self._with_rules(weights, outputs))

    def _send_ahead(self, stages: "list[tuple[str, Stage | None, tuple[str, str] | Technique]]") -> None:
        """Lets workers, where there are some, begin with stages that start from finished ones: (key, parent, what)."""
        for key, parent, what in stages if self.ahead.is_on else ():
            if self.store.find(key, isinstance(what, Technique)) is None:
                self.tree.enter(parent)
                self.ahead.send(key, self.sim, what)

    def _adopt(self, stage: Stage, state: bytes | None) -> None:
        """Changes the working copy to what a worker made of a stage; rules need no state."""
        if state is None:
            return
        with tempfile.TemporaryDirectory(prefix="qlab-") as folder:
            path = Path(folder) / "sim.safetensors"
            path.write_bytes(state)
            self.tree.adopt(stage, lambda: load_state(self.sim, path))

    def _with_rules(self, weights: str, outputs: str) -> Callable[[Progress], str]:
        def work(progress: Progress) -> str:
            set_rules(self.sim, weights, outputs)
            return ""

        return work

    def _apply(
        self, name: str, parent: Stage | None, technique: Technique, data: Batches | None = None
    ) -> Stage | None:
        """A stage that applies a technique."""

        def work(progress: Progress) -> str:
            judge = (
                self.scores.evaluation
                if technique.needs_score or isinstance(technique, (MixedPrecision, QAT))
                else None
            )
            report = technique.apply(self.sim, data or self.data, score=judge, progress=progress)
            for kind, value in _NOTHING_DONE.items():
                if isinstance(technique, kind) and not report.values.get(value):
                    raise _NothingToDo(report.summary)
            return report.summary

        record = StageRecord(name, GIVEN if parent is None else parent.record.stage, _name(technique))
        key = key_of("" if parent is None else parent.key, _identity(technique))
        return self._stage(Stage(record, parent, key, technique), work)

    def _stage(self, stage: Stage, work: Callable[[Progress], str]) -> Stage | None:
        """Runs one stage; None where there is nothing to build on: it was vetoed, failed, or found nothing to do."""
        record, started, progress = stage.record, time.perf_counter(), self._progress(*stage.names)

        def end(verdict: str, reason: str) -> None:
            stage.record = self._record(
                replace(record, verdict=verdict, reason=reason, seconds=time.perf_counter() - started)
            )

        self._require_time(record.stage)
        if self._finished() >= (self.settings.max_stages or math.inf) and self.tree.best() is not None:
            raise _Finished
        publish(self.progress, replace(record, steering=self.steering))
        is_done = False
        try:
            progress.step(0, 1)
            known = self.store.find(stage.key, stage.technique is not None)
            if known is not None:
                stage.record = replace(record, **known)
            else:
                found = self.ahead.take(stage.key, progress)
                if found is None:
                    self.tree.enter(stage.parent)
                    note = work(progress)
                    is_done = True
                    score, sqnr = self.scores.of(self.sim, progress)
                else:
                    note, score, sqnr, is_done = found.note, found.score, found.sqnr, True
                    self._adopt(stage, found.state)
                stage.record = self._scored(record, score, sqnr, started, "", note)
        except _Vetoed:
            end("vetoed", "while it ran" if is_done or stage.record is not record else "")
        except _NothingToDo as nothing:
            end("discarded", str(nothing))
        except (Cancelled, KeyboardInterrupt) as stop:
            end("discarded", _ENDED[not isinstance(stop, _OutOfTime)])
            raise
        except Exception as error:  # noqa: BLE001  the table shows it, and the other stages go on
            end("failed", _told(error))
            if is_done and isinstance(stage.technique, (BatchNormFolding, CrossLayerEqualization)):
                stage.builds_only = True  # only its score failed, which later ones need not
                return self._keep(stage)
        else:
            self._keep(stage, known is None)
            self._judge(stage)
            self._stop_if_done()
            return stage
        return None

    def _keep(self, stage: Stage, is_new: bool = False) -> Stage:
        """Remembers a stage and, where it was not read from there, writes it to the store."""
        if stage.technique is not None and (is_new or stage.builds_only):
            stage.snapshot = Snapshot(self.sim)
        if is_new:
            try:
                self.store.keep(stage.key, _numbers(stage.record), self.sim if stage.technique is not None else None)
            except OSError as error:  # a full disk costs the resumption, not the work
                self.notes.append(f"{stage.record.stage!r} could not be kept in {self.store.folder}: {error}.")
        if stage.builds_only:
            self.tree.stages.append(stage)
        return stage

    def _judge(self, stage: Stage) -> None:
        """Gives a scored stage its verdict and the reason, and makes it a candidate."""
        record, best = stage.record, self.tree.best()
        told = [record.reason] if record.reason else []
        if isinstance(stage.technique, BatchNormFolding):
            verdict = "effective"
            told.append("kept, for targets fold it")
        elif best is None or self.tree.ordered([best, stage])[0] is stage:
            verdict = "effective"
            told += [] if best is None else [f"better than {_with_score(best)}"]
        else:
            verdict = "discarded"
            told.append(f"no better than {_with_score(best)}")
        if self._reaches(record.score):
            verdict = "target met"
        if self.steering.is_forced(*stage.names):
            verdict = "forced"
        stage.record = self._record(replace(record, verdict=verdict, reason="; ".join(told)))
        self.tree.stages.append(stage)

    # The end ----------------------------------------------------------------------------------------------------------

    def _stop_if_done(self) -> None:
        best = self.tree.best()
        met = best is not None and self._reaches(best.record.score)
        if self.settings.stop_at_target and met and not self.tree.has_forced_ahead():
            raise _Finished

    def _reaches(self, score: float) -> bool:
        return self.target is not None and score >= self.target

    def _outcome(self, cancelled: bool) -> AutoQuantResult:
        best = self.tree.best()
        for stage in self.tree.stages:
            if self.tree.is_vetoed(stage):
                own = self.steering.is_vetoed(*stage.names)
                reason = "after it had run" if own else "built on what was vetoed"
                stage.record = self._record(replace(stage.record, verdict="vetoed", reason=reason))
        lineage = [] if best is None else [stage.record.stage for stage in best.line]
        self.tree.enter(best)
        met = best is not None and self._reaches(best.record.score)
        weights = next((r for r in self.records if r.stage == WEIGHTS), None)
        if not met and weights is not None and self.target is not None and weights.score < self.target:
            self.notes.append(f"with its weights in float: {weights.reason}.")
        self._tell_of_closer(best)
        if self.ahead.lost:
            self.notes.append(self.ahead.lost)
        score = math.nan if best is None else best.record.score
        return AutoQuantResult(
            technique="AutoQuant",
            summary=self._summary(score, lineage, met),
            rows=tuple(_numbers(record) for record in self.records),
            notes=tuple(self.notes),
            values={"float": self.float_score, "target": self.target, "score": score, "is_target_met": met},
            seconds=time.perf_counter() - self._started,
            as_done=self._as_done(),
            sim=self.sim,
            best=None if best is None else best.record,
            records=tuple(self.records),
            lineage=tuple(lineage),
            target=self.target,
            float_score=self.float_score,
            score_name=self.scores.name,
            cancelled=cancelled,
            findings=self.findings,
        )

    def _as_done(self) -> "AutoQuant | None":
        """The settings that find the same again, where a person steered or something ended the search early."""
        vetoed, forced = sorted(self.steering.vetoed), sorted(self.steering.forced)
        count = self._finished() if self._ended_early else self.settings.max_stages
        told = replace(self.settings, veto=vetoed, force=forced, max_stages=count, steering=None, time_budget_s=None)
        return None if told == replace(self.settings, time_budget_s=None) else told

    def _tell_of_closer(self, best: Stage | None) -> None:
        """Changes the notes: names a state that is much closer to the float model while its score is hardly worse."""
        if best is None or self.settings.within_error:
            return
        near = [s for s in self.tree.candidates() if s.record.score >= best.record.low]
        closest = max(near, key=lambda stage: stage.record.sqnr, default=best)
        if closest.record.sqnr > best.record.sqnr + 3:
            self.notes.append(
                f"{_with_score(closest)} is {closest.record.sqnr - best.record.sqnr:.0f} dB closer to the float model, "
                "and its score is within the interval of the best: within_error=True takes it."
            )

    def _summary(self, score: float, lineage: list[str], met: bool) -> str:
        def shown(value: float) -> str:
            return f"{value:.2%}" if 0 < self.float_score <= 1 else f"{value:.4g}"

        if not lineage:
            return f"no stage could be scored by {self.scores.name}: this is the sim as given"
        target = "" if self.target is None else f", target {shown(self.target)} {'met' if met else 'missed'}"
        return f"{self.scores.name} {shown(score)}, float {shown(self.float_score)}{target}; {' < '.join(lineage)}"

    # Records and progress ---------------------------------------------------------------------------------------------

    def _scored(
        self, record: StageRecord, score: Measurement, sqnr: float, started: float, verdict: str, reason: str
    ) -> StageRecord:
        low, high = score.interval or (math.nan, math.nan)
        above = next((known.score for known in self.records if known.stage == record.parent), math.nan)
        return replace(
            record,
            score=float(score),
            low=low,
            high=high,
            gain=float(score) - above,
            sqnr=sqnr,
            seconds=time.perf_counter() - started,
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

    def _require_time(self, name: str) -> None:
        """Raises _OutOfTime where the budget is spent; a first candidate is always found."""
        budget = self.settings.time_budget_s
        if budget is not None and self.tree.best() is not None and time.perf_counter() - self._started >= budget:
            raise _OutOfTime(name)

    def _finished(self) -> int:
        """How many stages count as run: a veto is as good as not having begun."""
        return sum(record.verdict != "vetoed" and record.reason not in _ENDED for record in self.records)

    def _progress(self, *names: str) -> "_StageProgress":
        return _StageProgress(self, names)


class _StageProgress:
    """The progress of one stage as a part of the whole; ends the stage when it is vetoed or the time is up."""

    def __init__(self, run: AutoQuantRun, names: tuple[str, ...]) -> None:
        self._run, self._names = run, names

    def step(self, done: int, total: int, text: str = "") -> None:
        """Report; raise where the stage, or everything, is to end."""
        run, name = self._run, self._names[0]
        if run.steering.is_vetoed(*self._names):
            raise _Vetoed(name)
        run._require_time(name)
        reached = min(len(run.records) + (min(done / total, 1.0) if total else 0.0), run.total)
        run.reached = max(run.reached, round(100 * reached))  # a stage has several parts that each begin at 0
        try:
            run.progress.step(run.reached, 100 * run.total, f"{name}: {text}" if text else name)
        except Cancelled:
            raise
        except Exception as error:
            raise _BrokenProgress(error) from error

    def publish(self, record: object) -> None:
        """Pass an intermediate result on."""
        publish(self._run.progress, record)


def _default(kind: type[Technique], sim: QuantSim, store: StageStore) -> Technique:
    """A technique that was only named: it keeps what it can resume from in the store, mixed precision the size."""
    if not issubclass(kind, MixedPrecision):
        folders = [f.name for f in fields(kind) if f.name in _FOLDERS] if store.folder is not None else []
        return kind(**{name: str(store.folder) for name in folders})
    weights = [q for q in sim.quantizers.values() if isinstance(q, WeightQuantizer) and q.enabled]
    numbers = sum(q.weight.numel() for q in weights)
    if not numbers:
        return kind()
    mean = sum(q.bits * q.weight.numel() for q in weights) / numbers
    near = range(max(2, math.floor(mean) - 2), min(16, math.ceil(mean) + 4) + 1)
    return kind(bits=tuple(near), budget=mean)


def _identity(technique: Technique) -> str:
    """The settings of a technique that its result depends on."""
    told = {f.name: getattr(technique, f.name) for f in fields(technique) if f.name not in (*_FOLDERS, "executor")}
    return f"{_name(technique)} {told}"


def _is_rounding(technique: Technique) -> bool:
    """Whether a technique is tried on the finalists: all but those with a place of their own."""
    return not isinstance(technique, (BatchNormFolding, CrossLayerEqualization, MixedPrecision, QAT))


def _name(technique: Technique) -> str:
    return type(technique).__name__


def _with_score(stage: Stage) -> str:
    return f"{stage.record.stage!r} ({stage.record.score:.4g})"


def _numbers(record: StageRecord) -> dict[str, object]:
    """A record as a row."""
    return {name: value for name, value in vars(record).items() if name != "steering"}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
