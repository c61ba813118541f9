"""One run of AutoQuant: which stages there are, in which order, and what each is told of itself.

A stage starts from a finished one, changes the working copy and is scored.
"""

import math
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from qlab.analysis.shadow import shadow
from qlab.errors import Cancelled, InputError
from qlab.graph.findings import Findings
from qlab.progress import Progress
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim import QuantSim, Snapshot
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation
from qlab.sim.files import load_state
from qlab.techniques.auto_quant_model import Admitted
from qlab.techniques.auto_quant_outcome import outcome
from qlab.techniques.auto_quant_result import AutoQuantResult
from qlab.techniques.batch_norm_folding import BatchNormFolding
from qlab.techniques.cross_layer_equalization import CrossLayerEqualization
from qlab.techniques.mixed_precision import MixedPrecision
from qlab.techniques.qat import QAT
from qlab.techniques.stage_log import ENDED, BrokenProgress, Finished, NothingToDo, OutOfTime, StageLog, Vetoed
from qlab.techniques.stage_scores import Scores
from qlab.techniques.stage_store import StageStore, fingerprint, key_of
from qlab.techniques.stage_techniques import did_nothing, identity, is_rounding, name_of, named
from qlab.techniques.stage_tree import Stage, StageTree, rule_changes, set_rules
from qlab.techniques.stages import FLOAT, GIVEN, VALIDATE, WEIGHTS, StageRecord, Steering
from qlab.techniques.stages_ahead import StagesAhead
from qlab.techniques.technique import Technique

if TYPE_CHECKING:
    from qlab.techniques.auto_quant import AutoQuant


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
        self.store = store
        self.sim = deepcopy(sim)
        self.sim.eval()
        self.scores = Scores(evaluation)
        self.tree = StageTree(self.sim, self.steering, store, data.source, settings.within_error)
        self.ahead = StagesAhead(settings.executor)
        self.techniques = [t if isinstance(t, Technique) else named(t, self.sim, store) for t in techniques]
        self.techniques = [
            replace(t, executor=settings.executor) if isinstance(t, MixedPrecision) and t.executor is None else t
            for t in self.techniques
        ]
        self.log = StageLog(progress, self.steering, settings.time_budget_s, lambda: self.tree.best() is not None)
        self.log.total = self._planned()
        self.target: float | None = None
        self.float_score = math.nan
        self.findings: Findings | None = None
        self.ended_early = False

    def validated(self, admitted: Admitted, seconds: float) -> None:
        """Records what the validator said of the model and whether a copy was prepared, as the first stage."""
        self.findings = admitted.findings
        self.log.notes += [admitted.note] if admitted.note else []
        self.log.record(StageRecord(VALIDATE, None, seconds=seconds, verdict="reference", reason=admitted.reason))

    def result(self) -> AutoQuantResult:
        """Runs all stages; the best of them."""
        cancelled = False
        try:
            self._search()
        except Finished:
            pass
        except OutOfTime:
            self.ended_early = True
            self.log.notes.append(f"the time budget of {self.settings.time_budget_s:g} s is spent.")
        except BrokenProgress as broken:
            raise broken.error from None
        except (Cancelled, KeyboardInterrupt):
            if self.settings.on_cancel == "raise" or self.tree.best() is None:
                raise
            cancelled = self.ended_early = True
            self.log.notes.append("cancelled; this is the best so far.")
        finally:
            self.ahead.close()
        return outcome(self, cancelled)

    # The plan ---------------------------------------------------------------------------------------------------------

    def _search(self) -> None:
        self._set_target()
        self.ahead.share(self.scores, self.data)
        given = self._as_given()
        self._weights_in_float(given)
        base = self._apply("BatchNormFolding", given, BatchNormFolding()) or given
        self._try_rules(base)
        for technique in self._each(CrossLayerEqualization):
            equalized = self._apply(name_of(technique), base, technique)
            if equalized is not None:
                self._try_rules(equalized)
        for technique in self._each(MixedPrecision):
            for stage in self.tree.top(1, is_rounding):
                self._apply(name_of(technique), stage, technique)
        finalists = self.tree.top(self.settings.finalists, is_rounding)
        rounding = list(filter(is_rounding, self.techniques))
        self._send_ahead([(key_of(s.key, identity(t)), s, t) for t in rounding for s in finalists])
        for technique in rounding:
            for stage in finalists:
                name = name_of(technique) if len(finalists) == 1 else f"{name_of(technique)} of {stage.record.stage}"
                self._apply(name, stage, technique)
        for technique in self._each(QAT):
            for stage in self.tree.top(1, is_rounding):
                self._apply(name_of(technique), stage, technique, self.labelled)

    def _each(self, kind: type[Technique]) -> list[Technique]:
        return [technique for technique in self.techniques if isinstance(technique, kind)]

    def _planned(self) -> int:
        """About how many stages there will be, for the progress bar."""
        branches = 1 + len(self._each(CrossLayerEqualization))
        rounding = len(list(filter(is_rounding, self.techniques)))
        once = len(self._each(MixedPrecision)) + len(self._each(QAT))
        return 3 + branches * (1 + len(self.settings.rules)) + rounding * self.settings.finalists + once

    # Stages -----------------------------------------------------------------------------------------------------------

    def _set_target(self) -> None:
        """Scores the float model; raises InputError where that or the target makes no sense."""
        started, wanted = time.perf_counter(), self.settings.target
        self.log.progress_of(FLOAT).step(0, 1)
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
        self.log.record(self.log.scored(StageRecord(FLOAT, None), score, math.nan, started, "reference", reason))

    def _as_given(self) -> Stage | None:
        """The sim as given, calibrated where it was not."""
        note = ""
        if any(isinstance(q, Quantizer) and q.enabled and q.encoding is None for q in self.sim.quantizers.values()):
            self.sim.calibrate(self.data, self.log.progress_of(GIVEN))
            self.tree.begin()
            note = "its ranges come from the batches, for it was not calibrated"
        key = ""
        if self.store.folder is not None:
            key = fingerprint(self.sim, chain(self.data, self.labelled or ()), self.scores.evaluation)
        return self._stage(Stage(StageRecord(GIVEN, None), None, key_of("begin", key)), lambda _: note)

    def _weights_in_float(self, given: Stage | None) -> None:
        """Scores the sim with its weights in float: what no technique for weights alone can exceed."""
        started, progress = time.perf_counter(), self.log.progress_of(WEIGHTS)
        record = StageRecord(WEIGHTS, None if given is None else GIVEN)
        self.tree.enter(given)
        twin = shadow(self.sim)
        for quantizer in twin.quantizers.values():
            if isinstance(quantizer, WeightQuantizer):
                quantizer.enabled = False
        try:
            score, sqnr = self.scores.of(twin, progress)
        except Vetoed:
            self.log.record(replace(record, verdict="vetoed"))
            return
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001  the table shows it
            self.log.record(replace(record, verdict="failed", reason=_told(error)))
            return
        reason = "what activations alone cost"
        if self.target is not None and score < self.target:
            reason = (
                f"activations alone miss the target by {self.target - score:.4g}: techniques for weights alone cannot "
                "reach it"
            )
        self.log.record(self.log.scored(record, score, sqnr, started, "reference", reason))

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
            work = partial(self._set_rules, weights, outputs)
            self._stage(Stage(record, parent, key, rules=(weights, outputs)), work)

    def _set_rules(self, weights: str, outputs: str, progress: Progress) -> str:
        set_rules(self.sim, weights, outputs)
        return ""

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
            if did_nothing(technique, report):
                raise NothingToDo(report.summary)
            return report.summary

        record = StageRecord(name, GIVEN if parent is None else parent.record.stage, name_of(technique))
        key = key_of("" if parent is None else parent.key, identity(technique))
        return self._stage(Stage(record, parent, key, technique), work)

    def _stage(self, stage: Stage, work: Callable[[Progress], str]) -> Stage | None:
        """Runs one stage; None where there is nothing to build on: it was vetoed, failed, or found nothing to do."""
        record, started, progress = stage.record, time.perf_counter(), self.log.progress_of(*stage.names)

        def end(verdict: str, reason: str) -> None:
            stage.record = self.log.record(
                replace(record, verdict=verdict, reason=reason, seconds=time.perf_counter() - started)
            )

        self.log.require_time(record.stage)
        if self.log.finished() >= (self.settings.max_stages or math.inf) and self.tree.best() is not None:
            raise Finished
        self.log.tell(record)
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
                stage.record = self.log.scored(record, score, sqnr, started, "", note)
        except Vetoed:
            end("vetoed", "while it ran" if is_done or stage.record is not record else "")
        except NothingToDo as nothing:
            end("discarded", str(nothing))
        except (Cancelled, KeyboardInterrupt) as stop:
            end("discarded", ENDED[not isinstance(stop, OutOfTime)])
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
                self.store.keep(stage.key, stage.record.numbers(), self.sim if stage.technique is not None else None)
            except OSError as error:  # a full disk costs the resumption, not the work
                self.log.notes.append(f"{stage.record.stage!r} could not be kept in {self.store.folder}: {error}.")
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
            told += [] if best is None else [f"better than {best.shown}"]
        else:
            verdict = "discarded"
            told.append(f"no better than {best.shown}")
        if self.reaches(record.score):
            verdict = "target met"
        if self.steering.is_forced(*stage.names):
            verdict = "forced"
        stage.record = self.log.record(replace(record, verdict=verdict, reason="; ".join(told)))
        self.tree.stages.append(stage)

    # The end ----------------------------------------------------------------------------------------------------------

    def _stop_if_done(self) -> None:
        best = self.tree.best()
        met = best is not None and self.reaches(best.record.score)
        if self.settings.stop_at_target and met and not self.tree.has_forced_ahead():
            raise Finished

    def reaches(self, score: float) -> bool:
        """Whether a score meets the target."""
        return self.target is not None and score >= self.target


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
