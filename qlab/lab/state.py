"""The state behind a Lab and the moves that change it, each complete: sim, rows, history, scores and watch agree after.

Everything here is called with the lock held and announces nothing; `Lab` locks, refuses and announces.
"""

from collections.abc import Iterable, Mapping

from qlab.lab.history import History
from qlab.lab.jobs import EngineLock
from qlab.lab.journal import Action, Edit
from qlab.lab.noticing import Watch, same_state
from qlab.lab.rows import LayerRow, Rows, size_bytes
from qlab.lab.scores import Scoreboard
from qlab.quantization import Quantizer
from qlab.sim import QuantSim


class LabState:
    """One sim with its rows, its history and its scores."""

    def __init__(
        self,
        sim: QuantSim,
        board: Scoreboard,
        lock: EngineLock,
        max_history_bytes: int,
        known: Mapping[str, object],
    ) -> None:
        self.sim = sim
        self.lock = lock
        self.board = board
        self.rows = Rows(sim)
        self.watch = Watch(sim, known)
        self.history = History(sim, self._all_rows(), size_bytes(sim), max_history_bytes)

    def edit(self, edit: Edit) -> tuple[str, ...]:
        """Performs an edit as one step, or changes nothing; returns the layers whose rows changed.

        An edit that asks for what is already so is no step.
        """
        quantizers = edit.targets(self.sim)
        before = [(quantizer, quantizer.state()) for quantizer in quantizers]
        try:
            edit.perform(self.sim)
            edited = self.affected(quantizers)
            rows = {name: self.rows.row(name) for name in edited}
        except BaseException:
            for quantizer, state in before:
                quantizer.set_state(state)
            self.watch.look()
            raise
        if all(same_state(state, quantizer.state()) for quantizer, state in before):
            self.watch.look()
            return ()
        self._add(edit, self.watch.names_of(quantizers), rows)
        return edited

    def notice(self) -> tuple[str, ...]:
        """Makes a step of what was done to the sim elsewhere; returns the layers whose rows changed."""
        if not self.watch.has_changes:
            return ()
        weights_changed = self.watch.weights_changed
        found = self.watch.difference(self.history.states_at(self.history.position, self.sim.quantizers))
        if found is None:
            self.watch.look()
            return ()
        action, names = found
        edited = self.rows.names if weights_changed else self.affected(self.sim.quantizers[name] for name in names)
        self._add(action, names, {name: self.rows.row(name) for name in edited}, new_weights=weights_changed)
        return edited

    def record(self, action: Action, new_weights: bool = False, seconds: float = 0.0) -> None:
        """Makes a step of what has just been done to the whole sim."""
        self._add(action, self.sim.quantizers, self._all_rows(), new_weights, seconds)

    def go_to(self, step: int) -> tuple[str, ...]:
        """Returns to a step; returns the layers whose rows changed."""
        self.board.version += 1
        names = self.history.go_to(step)
        self.watch.look()
        return self.affected(self.sim.quantizers[name] for name in names)

    def affected(self, quantizers: Iterable[object]) -> tuple[str, ...]:
        """The layers whose row shows one of these quantizers."""
        return self.rows.affected(quantizer for quantizer in quantizers if isinstance(quantizer, Quantizer))

    @property
    def missing(self) -> tuple[str, ...]:
        """The scores that were not measured in the present state."""
        return tuple(key for key in self.board.keys if key not in self.history.current.scores)

    def _add(
        self,
        action: Action,
        names: Iterable[str],
        rows: dict[str, LayerRow],
        new_weights: bool = False,
        seconds: float = 0.0,
    ) -> None:
        self.board.version += 1
        self.history.add(action, list(names), rows, size_bytes(self.sim), new_weights, seconds)
        self.watch.look()

    def _all_rows(self) -> dict[str, LayerRow]:
        return {row.name: row for row in self.rows.rows()}
