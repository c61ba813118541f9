"""Noticing what was done to a sim without the lab: settings changed in a cell, a calibration, weights that moved.

Versions are compared, which is cheap; only where one has grown are settings compared, and the difference becomes an
edit that is tried out, so that the journal tells what leads to the state and not merely what was assigned.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from qlab.lab.history import same_statistics
from qlab.lab.journal import Action, Edit, Foreign, Noticed, Set, SetEncoding, action_of, edits_between
from qlab.quantization import Encoding, Quantizer, QuantizerState, QuantSpec, WeightQuantizer
from qlab.sim import QuantSim
from qlab.sim.log import LogEntry, Marks, Setting

SETTINGS = (*QuantSpec.__dataclass_fields__, "enabled", "frozen")


class Watch:
    """Remembers how a sim was when `look` was called last."""

    def __init__(self, sim: QuantSim, known: Mapping[str, object]) -> None:
        self._sim = sim
        self._known = known
        self._model: tuple[Any, ...] = ()
        self.look()

    def look(self) -> None:
        """Takes the sim as it is now for known."""
        self._versions = {name: _version(quantizer) for name, quantizer in self._quantizers()}
        self._logged = tuple(self._sim.log)
        model = self._fingerprint()
        if self._model != model:
            self._model = model
            self._weights = Marks.of(self._sim).weights

    def names_of(self, quantizers: Iterable[Quantizer]) -> list[str]:
        """The names of quantizers in `sim.quantizers`."""
        names = {id(quantizer): name for name, quantizer in self._quantizers()}
        return [names[id(quantizer)] for quantizer in quantizers]

    @property
    def changed(self) -> list[str]:
        """The quantizers that something has touched since."""
        return [name for name, quantizer in self._quantizers() if self._versions.get(name) != _version(quantizer)]

    @property
    def weights_changed(self) -> bool:
        """Whether parameters, buffers or the graph are not those of last time."""
        return self._model != self._fingerprint()

    @property
    def has_changes(self) -> bool:
        """Whether anything was touched since."""
        return bool(self.changed) or self.weights_changed or len(self._sim.log) != len(self._logged)

    def difference(self, states: Mapping[str, QuantizerState]) -> tuple[Action, list[str]] | None:
        """What was done since, as an action, and the quantizers concerned; None where nothing was.

        states: of all quantizers, as they were. Changes a quantizer for a moment, to try the action out.
        """
        entries = self._sim.log[len(self._logged) :]
        if entries and tuple(self._sim.log[: len(self._logged)]) == self._logged:
            return self._told(states, entries), list(states)
        if self.weights_changed:
            return Foreign("weights were changed in a cell"), list(states)
        touched = [name for name in self.changed if not same_state(states[name], _quantizer(self._sim, name).state())]
        if not touched:
            return None
        edits: list[Edit] = []
        for name in touched:
            found = _edits(self._sim, name, states[name])
            if found is None:
                return Foreign("statistics or roundings were changed in a cell"), touched
            edits += found
        return (edits[0] if len(edits) == 1 else Noticed(tuple(edits))), touched

    def _told(self, states: Mapping[str, QuantizerState], entries: Sequence[LogEntry]) -> Action:
        """Calibrations and techniques in a cell, from the sim's log, with the settings made between them."""
        settings = {name: _setting(state) for name, state in states.items()}
        marks, actions = Marks(settings, self._weights), []
        for entry in entries:
            actions += [*edits_between(self._sim, marks, entry.before), action_of(entry, self._known)]
            marks = entry.after
        actions += edits_between(self._sim, marks, Marks.of(self._sim))
        return actions[0] if len(actions) == 1 else Noticed(tuple(actions))

    def _quantizers(self) -> Iterable[tuple[str, Quantizer]]:
        return ((name, q) for name, q in self._sim.quantizers.items() if isinstance(q, Quantizer))

    def _fingerprint(self) -> tuple[Any, ...]:
        marks: list[Any] = [len(self._sim.graph.edits)]
        waiting: list[Any] = [self._sim.model]
        while waiting:  # module.parameters() would cost more than the edit that is being noticed
            module = waiting.pop()
            waiting += module._modules.values()
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    marks.append((id(tensor), tensor._version, tensor.data_ptr()))
        return tuple(marks)


def _quantizer(sim: QuantSim, name: str) -> Quantizer:
    quantizer = sim.quantizers[name]
    assert isinstance(quantizer, Quantizer)
    return quantizer


def _version(quantizer: Quantizer) -> tuple[int, bool]:
    _ = quantizer.encoding  # a weight's is found now if the weight has changed, so that the version counts it
    return quantizer.version, quantizer.frozen


def _edits(sim: QuantSim, name: str, before: QuantizerState) -> list[Edit] | None:
    """Edits that lead from `before` to the present state, None where there are none; the state stays."""
    quantizer = _quantizer(sim, name)
    now = quantizer.state()
    part = "weight" if isinstance(quantizer, WeightQuantizer) else "output"
    changed = {key: value for key, value in _settings(now).items() if value != _settings(before)[key]}
    set_all = Set((quantizer.name,), part, changed)
    set_rest = Set((quantizer.name,), part, {key: value for key, value in changed.items() if key != "frozen"})
    set_grid = SetEncoding(quantizer.name, part, now.encoding, now.frozen)
    try:
        for attempt in ([set_all], [set_grid], [set_rest, set_grid]):
            quantizer.set_state(before)
            for edit in attempt:
                edit.perform(sim)
            if same_state(now, quantizer.state()):
                return list(attempt)
    finally:
        quantizer.set_state(now)
    return None


def _setting(state: QuantizerState) -> Setting:
    return Setting(state.spec, state.enabled, state.frozen, state.encoding if state.frozen else None)


def _settings(state: QuantizerState) -> dict[str, Any]:
    return {key: getattr(state.spec if key in QuantSpec.__dataclass_fields__ else state, key) for key in SETTINGS}


def same_state(a: QuantizerState, b: QuantizerState) -> bool:
    """Whether two states compute the same."""
    return (
        (a.spec, a.enabled, a.frozen) == (b.spec, b.enabled, b.frozen)
        and _same_encoding(a.encoding, b.encoding)
        and same_statistics(a.statistics, b.statistics)
        and _same_tensor(a.codes, b.codes)
        and _same_tensor(a.bias_correction, b.bias_correction)
    )


def _same_encoding(a: Encoding | None, b: Encoding | None) -> bool:
    return a is b or (a is not None and a.equals(b))


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and bool(a.equal(b)))
