"""AutoQuant: tries what helps, in the order that experience suggests, and keeps the best with every step in view."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from qlab.errors import InputError
from qlab.progress import Progress, Silent
from qlab.quantization import RangeRule
from qlab.settings import SettingError, setting
from qlab.sim import Agreement, Preset, QuantSim
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation, evaluation_of
from qlab.techniques.auto_quant_model import Admitted, admit
from qlab.techniques.auto_quant_result import AutoQuantResult
from qlab.techniques.auto_quant_run import AutoQuantRun
from qlab.techniques.stage_store import StageStore, require_writable
from qlab.techniques.stages import VALIDATE, StageRecord
from qlab.techniques.technique import TECHNIQUES, Technique

RULES = (
    ("min_max", "min_max"),
    ("mse", "min_max"),
    ("mse", "mse"),
    ("sqnr", "sqnr"),
    ("mse", "percentile(99.99)"),
)
"""Pairs of range rules to try: (weights, activations)."""


@dataclass(frozen=True)
class AutoQuant(Technique):
    """Finds the best combination of techniques for a target score; neither the sim nor the model given is changed.

    `result = AutoQuant(allowed_drop=0.01).apply(sim_or_model, batches, score=score)`: `result.sim` is new,
    `result.stages` says what was tried, what it gained and why it was kept or not, `result.save(folder)` writes it all.

    Stages: validation, where a model is given, and a prepared copy where `qlab.prepare` mends a warning; the sim as
    given; with its weights in float (where that misses the target, no technique for weights alone can help: it says so
    and goes on); BatchNorm folding; every pair of range `rules`, without and with cross-layer equalization; mixed
    precision where asked for; each rounding technique on the `finalists` best so far; a short QAT where asked for or
    where labelled batches are given. Ends when the target, float score - allowed_drop, is met. States are ranked by
    score, equal ones (`within_error`: nearly equal ones, too) by SQNR. What is common is computed once: states are
    returned to, statistics serve every rule.

    A stage whose technique or score fails is marked so and the rest goes on. Cancel and the time budget end the search
    with the best so far. With resume_dir an interrupted run goes on where it was. `veto` and `force` name stages, or
    techniques; a `Steering` lets a person add to them while it runs. When: first, where nothing else is known. Cost:
    about 15 evaluations of the score and what the techniques take.
    """

    needs_score: ClassVar[bool] = True

    allowed_drop: float = setting(0.01, "of the score against float, to be content with", minimum=0.0)
    target: float | None = setting(None, "score to reach, in place of float - allowed_drop")
    techniques: Any = setting(  # noqa: RUF009
        ("CrossLayerEqualization", "AdaRound"), "names, or techniques with their settings in code"
    )
    rules: Any = setting(RULES, "pairs of range rules (weights, activations) to try", hidden=True)  # noqa: RUF009
    finalists: int = setting(2, "states that rounding techniques are tried on", minimum=1, maximum=20)
    within_error: bool = setting(
        False, "of scores that differ by less than their standard error, take the state closest to the float model"
    )
    time_budget_s: float | None = setting(None, "end with the best so far after this time", minimum=0.0, unit="s")
    stop_at_target: bool = setting(True, "end as soon as the target is met")
    on_cancel: str = setting("best", "when cancelled: return the best so far, or raise", choices=("best", "raise"))
    resume_dir: str | None = setting(None, "a folder of finished stages, from which a rerun goes on")
    save_dir: str | None = setting(None, "a folder for the model, its encodings and the report, with a check on target")
    veto: Any = setting((), "stages, or techniques, to leave out", hidden=True)  # noqa: RUF009
    force: Any = setting((), "stages, or techniques, to keep whatever their score", hidden=True)  # noqa: RUF009
    max_stages: int | None = setting(None, "end with the best of the first so many stages", minimum=1, hidden=True)
    executor: Any = setting(  # noqa: RUF009
        None, "workers (concurrent.futures, dask) for stages that start from the same state", hidden=True
    )
    steering: Any = setting(None, "a Steering, to veto and force stages while it runs", hidden=True)  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.techniques.split(",") if isinstance(self.techniques, str) else self.techniques
        if isinstance(given, Technique) or not isinstance(given, Sequence):
            given = (given,)
        cleaned = tuple(item.strip() if isinstance(item, str) else item for item in given if item != "")
        object.__setattr__(self, "techniques", cleaned)
        for name in ("veto", "force"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        for weights, outputs in self.rules:
            RangeRule.of(weights), RangeRule.of(outputs)

    def apply(
        self,
        sim: QuantSim | nn.Module,
        batches: Any = None,
        score: "Evaluation | Any" = None,
        progress: Progress | None = None,
        *,
        example: Any = None,
        preset: Preset | None = None,
        labelled: Any = None,
    ) -> AutoQuantResult:
        """Returns the best sim found; `sim` is not changed.

        sim: a QuantSim, or any model, which is captured with `example` (default: the first batch) and `preset`.
        batches: calibration data. score: an evaluation or function, larger is better; agreement with the float model
        without one. labelled: batches of (x, y) for a short QAT at the end.

        Raises InputError for no data, a folder that cannot be written, a target above the float score, and where the
        score fails on the float model. A model that cannot be captured gives a result with the validator's findings.
        """
        data = self._data(batches)
        assert data is not None
        first = next(iter(data), None)
        if first is None:
            raise InputError("AutoQuant needs at least one batch; the iterable was empty.")
        judge = Agreement(data) if score is None else evaluation_of(score)
        if self.save_dir is not None:
            require_writable(self.save_dir)
        store = StageStore(self.resume_dir)
        chosen = self._resolved(labelled is not None)
        admitted, started = None, time.perf_counter()
        if not isinstance(sim, QuantSim):
            admitted = admit(sim, first if example is None else example, preset)
            if admitted.sim is None:
                return _not_captured(sim, admitted)
            sim = admitted.sim
        elif preset is not None:
            raise InputError("preset= is for models; a QuantSim has its own. Give the model, or leave preset out.")
        seconds = time.perf_counter() - started
        for batch in data:  # what is wrong with the data is said before the work starts, and not by every stage
            sim.inputs(batch)
        run = AutoQuantRun(
            sim=sim,
            data=data,
            evaluation=judge,
            techniques=chosen,
            labelled=None if labelled is None else Batches(labelled),
            settings=self,
            store=store,
            progress=progress or Silent(),
        )
        if admitted is not None:
            run.validated(admitted, seconds)
        result = run.result()
        if self.save_dir is not None:
            try:
                result.save(self.save_dir, data)
            except Exception as error:  # noqa: BLE001  the note shows it, and the result is not lost
                told = f"not everything could be saved in {self.save_dir}: {type(error).__name__}: {error}"
                result = replace(result, notes=(*result.notes, told))
        return result

    def _resolved(self, has_labels: bool) -> list[Technique | type[Technique]]:
        """Techniques, or classes where only a name was given; raises SettingError for an unknown one."""
        found: list[Technique | type[Technique]] = []
        for item in self.techniques:
            if isinstance(item, str) and item in TECHNIQUES:
                found.append(TECHNIQUES[item])
            elif isinstance(item, Technique) or (isinstance(item, type) and issubclass(item, Technique)):
                found.append(item)
            else:
                known = ", ".join(name for name in TECHNIQUES if name != "AutoQuant")
                raise SettingError(f"AutoQuant(techniques=...) knows {known}; got {item!r}.")
        kinds = [item if isinstance(item, type) else type(item) for item in found]
        if AutoQuant in kinds:
            raise SettingError("AutoQuant(techniques=...) cannot hold AutoQuant itself.")
        if has_labels and not any(kind.__name__ == "QAT" for kind in kinds) and "QAT" in TECHNIQUES:
            found.append(TECHNIQUES["QAT"])
        return found


def _not_captured(model: nn.Module, admitted: Admitted) -> AutoQuantResult:
    """The validator's findings in place of a sim."""
    record = StageRecord(VALIDATE, None, verdict="failed", reason=admitted.reason)
    return AutoQuantResult(
        "AutoQuant",
        f"{type(model).__name__} cannot be captured: {admitted.reason}",
        notes=("the findings say what is in the way and how to mend it; qlab.validate(model, example) shows them.",),
        records=(record,),
        findings=admitted.findings,
    )
