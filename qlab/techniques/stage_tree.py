"""The tree of AutoQuant's stages: how to return to the state of each, and which to go on with.

What holds a state is kept as a snapshot; a choice of range rules is only remembered as such, for statistics serve every
rule and it costs nothing to make again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlab.quantization import Quantizer, RangeRule, WeightQuantizer
from qlab.sim import QuantSim, Snapshot
from qlab.sim.log import LogEntry, Marks
from qlab.techniques.stage_store import StageStore
from qlab.techniques.stages import StageRecord, Steering
from qlab.techniques.technique import Technique


@dataclass(eq=False)
class Stage:
    """A finished stage with what is needed to return to its state: a snapshot, rules on its parent, or a file.

    key: its name in the store. builds_only: later stages may start from it, but it is no candidate.
    """

    record: StageRecord
    parent: "Stage | None"
    key: str
    technique: Technique | None = None
    rules: tuple[str, str] | None = None
    snapshot: Snapshot | None = None
    builds_only: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What a person may call it: its own name or its technique's."""
        return (self.record.stage, self.record.technique) if self.record.technique else (self.record.stage,)

    @property
    def shown(self) -> str:
        """Its name with its score, for a sentence."""
        return f"{self.record.stage!r} ({self.record.score:.4g})"

    @property
    def line(self) -> "list[Stage]":
        """The stage and all that it was built on, itself first."""
        return [self, *(self.parent.line if self.parent is not None else [])]


class StageTree:
    """The finished stages of one working copy, `sim`, which `enter` changes from one state to another."""

    def __init__(
        self, sim: QuantSim, steering: Steering, store: StageStore, data: Any, within_error: bool = False
    ) -> None:
        self.sim, self.steering, self.store = sim, steering, store
        self.stages: list[Stage] = []
        self.within_error = within_error
        self._root = Snapshot(sim)
        self._data = data

    def begin(self) -> None:
        """Changes what counts as the state to begin with: the present one."""
        self._root = Snapshot(self.sim)

    def enter(self, stage: Stage | None) -> None:
        """Changes the working copy to the state of a stage; None is the state to begin with."""
        if stage is None:
            self._root.restore()
        elif stage.snapshot is not None:
            stage.snapshot.restore()
        elif stage.rules is not None:
            self.enter(stage.parent)
            set_rules(self.sim, *stage.rules)
        else:
            self._enter_from_file(stage)
            stage.snapshot = Snapshot(self.sim)

    def _enter_from_file(self, stage: Stage) -> None:
        if stage.technique is None:
            self.enter(stage.parent)
        else:
            self.adopt(stage, lambda: self.store.load(stage.key, self.sim))

    def adopt(self, stage: Stage, load: Callable[[], None]) -> None:
        """Changes the working copy to a state that was computed elsewhere; `load` puts it on the one to begin with."""
        self.enter(stage.parent)
        log, before = list(self.sim.log), Marks.of(self.sim)
        self._root.restore()
        load()
        self.sim.log[:] = [*log, LogEntry(stage.technique, self._data, None, before, Marks.of(self.sim))]

    # Choosing ---------------------------------------------------------------------------------------------------------

    def is_vetoed(self, stage: Stage) -> bool:
        """Whether a person ruled out the stage or something that it was built on."""
        return any(self.steering.is_vetoed(*above.names) for above in stage.line)

    def candidates(self) -> list[Stage]:
        """What nobody vetoed; of that, what has the most forced stages behind it."""
        possible = [stage for stage in self.stages if not stage.builds_only and not self.is_vetoed(stage)]
        forced = [sum(self.steering.is_forced(*above.names) for above in stage.line) for stage in possible]
        return [stage for stage, count in zip(possible, forced, strict=True) if count == max(forced)]

    def best(self) -> Stage | None:
        """The first of the candidates by `ordered`."""
        return next(iter(self.ordered(self.candidates())), None)

    def top(self, count: int, without: Callable[[Technique], bool]) -> list[Stage]:
        """The best candidates that were built `without` certain techniques; others where there are none."""
        found = self.candidates()
        plain = [s for s in found if not any(a.technique is not None and without(a.technique) for a in s.line)]
        return self.ordered(plain or found)[:count]

    def ordered(self, stages: list[Stage]) -> list[Stage]:
        """Best first: by score, equal ones by SQNR, then the earlier.

        With `within_error` all scores within a standard error of the highest count as equal.
        """
        ranked = sorted(stages, key=lambda stage: rank(stage.record), reverse=True)
        if not self.within_error or not ranked:
            return ranked
        highest = ranked[0].record
        error = (highest.high - highest.low) / (2 * 1.96)
        least = highest.score - (error if math.isfinite(error) else 0.0)
        close = [stage for stage in ranked if stage.record.score >= least]
        close.sort(key=lambda stage: rank(stage.record)[::-1], reverse=True)
        return close + ranked[len(close) :]

    def has_forced_ahead(self) -> bool:
        """Whether a person forced something that has not run yet."""
        return bool(self.steering.forced - {name for stage in self.stages for name in stage.names})


def rank(record: StageRecord) -> tuple[float, float]:
    """What states are compared by: score first, then SQNR; what is unknown comes last."""
    score, sqnr = (-math.inf if math.isnan(value) else value for value in (record.score, record.sqnr))
    return score, sqnr


def set_rules(sim: QuantSim, weights: str, outputs: str) -> None:
    """Changes `sim`: the range rules of all quantizers that follow one."""
    for quantizer, rule in rule_changes(sim, weights, outputs):
        quantizer.rule = rule


def rule_changes(sim: QuantSim, weights: str, outputs: str) -> list[tuple[Quantizer, RangeRule]]:
    """The quantizers whose rule would be another; frozen ones, and those of a known range, follow none."""
    found = []
    for quantizer in sim.quantizers.values():
        assert isinstance(quantizer, Quantizer)
        rule = RangeRule.of(weights if isinstance(quantizer, WeightQuantizer) else outputs)
        follows = quantizer.enabled and not quantizer.frozen and quantizer.spec.known_range is None
        if follows and quantizer.rule != rule:
            found.append((quantizer, rule))
    return found
