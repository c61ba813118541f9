"""What an ended run of AutoQuant returns: the best of its stages, and what is to be told of the rest."""

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from qlab.techniques.auto_quant_result import AutoQuantResult
from qlab.techniques.stage_tree import Stage
from qlab.techniques.stages import WEIGHTS

if TYPE_CHECKING:
    from qlab.techniques.auto_quant import AutoQuant
    from qlab.techniques.auto_quant_run import AutoQuantRun


def outcome(run: "AutoQuantRun", cancelled: bool) -> AutoQuantResult:
    """The result of `run`, which ended; its working copy becomes the best sim."""
    best = run.tree.best()
    for stage in run.tree.stages:
        if run.tree.is_vetoed(stage):
            own = run.steering.is_vetoed(*stage.names)
            reason = "after it had run" if own else "built on what was vetoed"
            stage.record = run.log.record(replace(stage.record, verdict="vetoed", reason=reason))
    lineage = [] if best is None else [stage.record.stage for stage in best.line]
    run.tree.enter(best)
    met = best is not None and run.reaches(best.record.score)
    weights = next((r for r in run.log.records if r.stage == WEIGHTS), None)
    if not met and weights is not None and run.target is not None and weights.score < run.target:
        run.log.notes.append(f"with its weights in float: {weights.reason}.")
    _tell_of_closer(run, best)
    if run.ahead.lost:
        run.log.notes.append(run.ahead.lost)
    score = math.nan if best is None else best.record.score
    return AutoQuantResult(
        technique="AutoQuant",
        summary=_summary(run, score, lineage, met),
        rows=tuple(record.numbers() for record in run.log.records),
        notes=tuple(run.log.notes),
        values={"float": run.float_score, "target": run.target, "score": score, "is_target_met": met},
        seconds=time.perf_counter() - run.log.started,
        as_done=_as_done(run),
        sim=run.sim,
        best=None if best is None else best.record,
        records=tuple(run.log.records),
        lineage=tuple(lineage),
        target=run.target,
        float_score=run.float_score,
        score_name=run.scores.name,
        cancelled=cancelled,
        findings=run.findings,
    )


def _as_done(run: "AutoQuantRun") -> "AutoQuant | None":
    """The settings that find the same again, where a person steered or something ended the search early."""
    vetoed, forced = sorted(run.steering.vetoed), sorted(run.steering.forced)
    count = run.log.finished() if run.ended_early else run.settings.max_stages
    told = replace(run.settings, veto=vetoed, force=forced, max_stages=count, steering=None, time_budget_s=None)
    return None if told == replace(run.settings, time_budget_s=None) else told


def _tell_of_closer(run: "AutoQuantRun", best: Stage | None) -> None:
    """Changes the notes: names a state that is much closer to the float model while its score is hardly worse."""
    if best is None or run.settings.within_error:
        return
    near = [s for s in run.tree.candidates() if s.record.score >= best.record.low]
    closest = max(near, key=lambda stage: stage.record.sqnr, default=best)
    if closest.record.sqnr > best.record.sqnr + 3:
        run.log.notes.append(
            f"{closest.shown} is {closest.record.sqnr - best.record.sqnr:.0f} dB closer to the float model, "
            "and its score is within the interval of the best: within_error=True takes it."
        )


def _summary(run: "AutoQuantRun", score: float, lineage: list[str], met: bool) -> str:
    def shown(value: float) -> str:
        return f"{value:.2%}" if 0 < run.float_score <= 1 else f"{value:.4g}"

    if not lineage:
        return f"no stage could be scored by {run.scores.name}: this is the sim as given"
    target = "" if run.target is None else f", target {shown(run.target)} {'met' if met else 'missed'}"
    return f"{run.scores.name} {shown(score)}, float {shown(run.float_score)}{target}; {' < '.join(lineage)}"
