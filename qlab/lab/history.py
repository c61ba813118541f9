"""Steps that can be undone, redone and compared: small for edits, whole snapshots for techniques under a budget.

A step holds the states of the quantizers that it changed; what a quantizer was at any step is the latest state up to
it. Weights belong to an epoch, which a technique begins, and of which a snapshot is kept from its beginning, so that
even a change made behind the lab's back can be undone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
import torch

from qlab.errors import HistoryError
from qlab.lab.journal import Action
from qlab.lab.rows import LayerRow
from qlab.lab.scores import SCORE_KEYS
from qlab.quantization import Quantizer, QuantizerState, Statistics
from qlab.sim import Measurement, QuantSim, Snapshot


@dataclass(frozen=True, eq=False)
class Step:
    """The state after one action; action None for the beginning.

    states: of the quantizers that the action changed, by name. rows: of the layers that it changed. epoch: which
    weights. scores: measured in this state, by key; filled in later. noise: dB by layer, likewise.
    """

    number: int
    action: Action | None
    states: dict[str, QuantizerState]
    rows: Mapping[str, LayerRow]
    epoch: int
    size_bytes: int
    seconds: float = 0.0
    scores: dict[str, Measurement] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """One line for the person."""
        return "start" if self.action is None else self.action.label


class History:
    """The steps of one sim and the position among them.

    max_bytes: budget for snapshots of weights. When it is exceeded the oldest snapshots are dropped, and the steps of
    their epochs can no longer be returned to.
    """

    def __init__(self, sim: QuantSim, rows: Mapping[str, LayerRow], size_bytes: int, max_bytes: int) -> None:
        self._sim = sim
        self._max_bytes = max_bytes
        self._statistics: dict[str, Statistics] = {}
        self._snapshots: dict[int, Snapshot] = {}
        self.steps = [Step(0, None, self.states(sim.quantizers), dict(rows), 0, size_bytes)]
        self.position = 0
        self._keep_weights()

    @property
    def current(self) -> Step:
        """The step whose state the sim is in."""
        return self.steps[self.position]

    @property
    def actions(self) -> list[Action]:
        """What was done and not undone, in order."""
        return [step.action for step in self.steps[1 : self.position + 1] if step.action is not None]

    def states(self, names: Iterable[str]) -> dict[str, QuantizerState]:
        """The present states of the named quantizers; statistics that did not change are shared between steps."""
        found = {}
        for name in names:
            quantizer = self._sim.quantizers[name]
            assert isinstance(quantizer, Quantizer)
            state, known = quantizer.state(), self._statistics.get(name)
            if known is not None and same_statistics(known, state.statistics):
                state = replace(state, statistics=known)
            self._statistics[name] = state.statistics
            found[name] = state
        return found

    def _keep_weights(self) -> None:
        """Remembers the weights of the present epoch while they are there: anything may change them next."""
        epoch = self.current.epoch
        if epoch not in self._snapshots:
            self._snapshots[epoch] = Snapshot(self._sim)
            self._keep_budget(epoch)

    def add(
        self,
        action: Action,
        names: Iterable[str],
        rows: Mapping[str, LayerRow],
        size_bytes: int,
        new_weights: bool = False,
        seconds: float = 0.0,
    ) -> Step:
        """The step after `action`, which changed the named quantizers; undone steps are dropped."""
        del self.steps[self.position + 1 :]
        epoch = self.current.epoch
        if new_weights:
            epoch += 1
            for later in [known for known in self._snapshots if known >= epoch]:
                del self._snapshots[later]
        step = Step(self.position + 1, action, self.states(names), dict(rows), epoch, size_bytes, seconds)
        self.steps.append(step)
        self.position = step.number
        if new_weights:
            self._keep_weights()
        return step

    def is_reachable(self, number: int) -> bool:
        """Whether the state of that step can be returned to."""
        epoch = self.steps[number].epoch
        return epoch == self.current.epoch or epoch in self._snapshots

    def go_to(self, number: int) -> set[str]:
        """Changes the sim to the state of that step; returns the names of the quantizers that may have changed."""
        if not 0 <= number < len(self.steps):
            raise HistoryError(f"there is no step {number}; steps are 0 to {len(self.steps) - 1}.")
        target, current = self.steps[number], self.current
        if not self.is_reachable(number):
            raise HistoryError(
                f"step {number} ({target.label}) cannot be returned to: its weights were dropped to stay within "
                f"{self._max_bytes:,} bytes (Lab's max_history_bytes), or were changed outside the lab."
            )
        if target.epoch != current.epoch:
            self._keep_weights()
            self._snapshots[target.epoch].restore()
            names = set(self._sim.quantizers)
        else:
            first, last = sorted((number, self.position))
            names = {name for step in self.steps[first + 1 : last + 1] for name in step.states}
        for name, state in self.states_at(number, names).items():
            quantizer = self._sim.quantizers[name]
            assert isinstance(quantizer, Quantizer)
            quantizer.set_state(state)
        self.position = number
        return names

    def states_at(self, number: int, names: Iterable[str]) -> dict[str, QuantizerState]:
        """What the named quantizers were at a step."""
        wanted, found = set(names), {}
        for step in reversed(self.steps[: number + 1]):
            for name in wanted & step.states.keys():
                found[name] = step.states[name]
            wanted -= step.states.keys()
        return found

    def rows_at(self, number: int) -> dict[str, LayerRow]:
        """The rows of all layers at a step."""
        if not 0 <= number < len(self.steps):
            raise HistoryError(f"there is no step {number}; steps are 0 to {len(self.steps) - 1}.")
        found: dict[str, LayerRow] = {}
        for step in self.steps[: number + 1]:
            found.update(step.rows)
        return found

    def latest_noise(self) -> dict[str, float]:
        """The noise of layers measured in the present state, else the one measured before it."""
        return next((step.noise for step in reversed(self.steps[: self.position + 1]) if step.noise), {})

    def to_pandas(self) -> pd.DataFrame:
        """One row a step: what was done, the scores and the size after it, and whether it can be returned to."""
        rows = [
            {
                "step": step.number,
                "action": step.label,
                "verb": "start" if step.action is None else step.action.verb,
                **{key: float(step.scores[key]) if key in step.scores else None for key in SCORE_KEYS},
                "size_bytes": step.size_bytes,
                "is_current": step.number == self.position,
                "is_undone": step.number > self.position,
                "is_reachable": self.is_reachable(step.number),
                "seconds": step.seconds,
            }
            for step in self.steps
        ]
        frame = pd.DataFrame(rows)
        return frame.astype(dict.fromkeys(SCORE_KEYS, "float64"))

    def _keep_budget(self, newest: int) -> None:
        for epoch in sorted(self._snapshots):
            if sum(snapshot.bytes for snapshot in self._snapshots.values()) <= self._max_bytes:
                return
            if epoch != newest:
                del self._snapshots[epoch]
                for step in self.steps:
                    if step.epoch == epoch:
                        step.states.clear()  # roundings are as large as weights, and nobody can go there any more
        if self._snapshots[newest].bytes > self._max_bytes:
            del self._snapshots[newest]


def same_statistics(known: Statistics, now: Statistics) -> bool:
    """Whether both saw the same."""
    if known is now:
        return True
    same = known.elements == now.elements and known.axis == now.axis and known.counts.shape == now.counts.shape
    return (
        same
        and _same(known.minimum, now.minimum)
        and _same(known.maximum, now.maximum)
        and _same(known.counts, now.counts)
    )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
