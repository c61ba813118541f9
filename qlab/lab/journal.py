"""Actions as data: what was done to a sim, how to do it again, and the Python that does it.

An action's `perform` and its `code` stand side by side because they must do the same: the script of a Lab is the code
of its actions, and a test runs it in a fresh process and compares every scale, zero point, weight and score.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlab.errors import SpecError
from qlab.lab.code import Code, call_of, literal, plain, technique_code
from qlab.quantization import Encoding, Quantizer, QuantSpec, WeightQuantizer
from qlab.sim import Batches, QuantSim
from qlab.sim.log import LogEntry, Marks
from qlab.techniques import Technique

PARTS = ("weight", "output")


@dataclass(frozen=True)
class Named:
    """A value that code cannot spell out, batches or a score, by the name that it has in the person's notebook.

    name: None where no name is known.
    """

    name: str | None

    @classmethod
    def find(cls, value: object, known: Mapping[str, object]) -> "Named":
        """The name among `known`, or among the variables of the notebook, that holds `value`."""
        own = ((k, v) for k, v in list(vars(sys.modules["__main__"]).items()) if not k.startswith("_"))
        wanted = _data(value)
        name = next((name for name, held in (*known.items(), *own) if _data(held) is wanted), None)
        return cls(name)


class Action(ABC):
    """One thing that was done; `verb` is the word for it."""

    verb: str

    @property
    @abstractmethod
    def label(self) -> str:
        """One line for the history."""

    @abstractmethod
    def code(self) -> Code:
        """Python that does it to `sim`."""


class Edit(Action):
    """An action on settings of quantizers: immediate, and small to undo."""

    @abstractmethod
    def targets(self, sim: QuantSim) -> list[Quantizer]:
        """The quantizers that it changes. Raises where a layer or part does not exist."""

    @abstractmethod
    def perform(self, sim: QuantSim) -> None:
        """Changes `sim`; the caller undoes what was changed where this raises."""


@dataclass(frozen=True)
class Set(Edit):
    """Settings of one part of named layers."""

    layers: tuple[str, ...]
    part: str
    settings: Mapping[str, Any]
    verb = "set"

    @property
    def label(self) -> str:
        return f"{_naming(self.layers)} {self.part} {_settings(self.settings)}"

    def targets(self, sim: QuantSim) -> list[Quantizer]:
        return distinct(quantizer_of(sim, name, self.part) for name in self.layers)

    def perform(self, sim: QuantSim) -> None:
        for quantizer in self.targets(sim):
            quantizer.set(**self.settings)

    def code(self) -> Code:
        arguments = ", ".join(f"{key}={literal(value)}" for key, value in self.settings.items())
        if len(self.layers) == 1:
            return Code.line(f"sim[{self.layers[0]!r}].{self.part}.set({arguments})")
        names = repr(list(self.layers))
        if len(names) > 100:
            names = "[\n" + "".join(f"    {name!r},\n" for name in self.layers) + "]"
        return Code(f"for name in {names}:\n    sim[name].{self.part}.set({arguments})\n")


@dataclass(frozen=True)
class Configure(Edit):
    """Settings of every layer that matches a glob."""

    pattern: str
    weight: Mapping[str, Any] = field(default_factory=dict)
    output: Mapping[str, Any] = field(default_factory=dict)
    verb = "configure"

    @property
    def label(self) -> str:
        parts = [f"{part} {_settings(asked)}" for part in PARTS if (asked := getattr(self, part))]
        return f"{self.pattern} {', '.join(parts)}"

    def targets(self, sim: QuantSim) -> list[Quantizer]:
        found: list[Quantizer] = []
        for layer in sim.matching(self.pattern):
            if self.weight and layer.weight is not None:
                found.append(layer.weight)
            if self.output and layer.output is not None and layer.role.value == "quantized":
                found.append(layer.output)
        return distinct(found)

    def perform(self, sim: QuantSim) -> None:
        sim.configure(self.pattern, weight=dict(self.weight), output=dict(self.output))

    def code(self) -> Code:
        asked = {part: dict(getattr(self, part)) for part in PARTS if getattr(self, part)}
        return Code.line(call_of("sim.configure", (self.pattern,), asked))


@dataclass(frozen=True)
class SetRange(Edit):
    """The range of one part of one layer: a number for each bound, or one for each channel."""

    layer: str
    part: str
    low: float | tuple[float, ...]
    high: float | tuple[float, ...]
    verb = "set_range"

    @property
    def label(self) -> str:
        if isinstance(self.low, tuple):
            return f"{self.layer} {self.part} range of {len(self.low)} channels"
        return f"{self.layer} {self.part} range {self.low:.4g} to {self.high:.4g}"

    def targets(self, sim: QuantSim) -> list[Quantizer]:
        return [quantizer_of(sim, self.layer, self.part)]

    def perform(self, sim: QuantSim) -> None:
        low, high = (torch.tensor(bound) if isinstance(bound, tuple) else bound for bound in (self.low, self.high))
        quantizer_of(sim, self.layer, self.part).set_range(low, high)

    def code(self) -> Code:
        bounds = [repr(self.low), repr(self.high)]
        imports: tuple[str, ...] = ()
        if isinstance(self.low, tuple) and isinstance(self.high, tuple):
            bounds, imports = [f"torch.tensor({list(bound)})" for bound in (self.low, self.high)], ("import torch",)
        return Code.line(f"sim[{self.layer!r}].{self.part}.set_range({', '.join(bounds)})", imports)


@dataclass(frozen=True)
class SetEncoding(Edit):
    """A grid given as it is, for what no setting says: a quantizer's `encoding` was assigned in a cell."""

    layer: str
    part: str
    encoding: Encoding | None
    frozen: bool
    verb = "set_encoding"

    @property
    def label(self) -> str:
        return f"{self.layer} {self.part} encoding"

    def targets(self, sim: QuantSim) -> list[Quantizer]:
        return [quantizer_of(sim, self.layer, self.part)]

    def perform(self, sim: QuantSim) -> None:
        quantizer = quantizer_of(sim, self.layer, self.part)
        quantizer.encoding = self.encoding
        quantizer.frozen = self.frozen

    def code(self) -> Code:
        where, encoding = f"sim[{self.layer!r}].{self.part}", self.encoding
        if encoding is None:
            return Code(f"{where}.encoding = None\n{where}.frozen = {self.frozen}\n")
        tensors = [f"torch.tensor({getattr(encoding, key).tolist()})" for key in ("scale", "zero_point")]
        rest = [str(encoding.qmin), str(encoding.qmax)]
        if encoding.axis is not None:
            rest.append(f"axis={encoding.axis}")
        if encoding.block_size is not None:
            rest += [f"block_size={encoding.block_size}", f"block_axis={encoding.block_axis}"]
        value = f"qlab.Encoding({', '.join(tensors + rest)})"
        return Code(f"{where}.encoding = {value}\n{where}.frozen = {self.frozen}\n", ("import torch",))


@dataclass(frozen=True)
class Calibrate(Action):
    """New statistics from data."""

    batches: Named
    verb = "calibrate"

    @property
    def label(self) -> str:
        return "calibrate"

    def code(self) -> Code:
        if self.batches.name is None:
            return Code.missing("sim.calibrate(...)", "its data has no name")
        return Code.line(f"sim.calibrate({self.batches.name})")


@dataclass(frozen=True)
class Apply(Action):
    """A technique that was run. gives_sim: its result holds a new sim, with which the lab went on."""

    technique: Technique
    batches: Named | None
    score: Named | None
    gives_sim: bool = False
    verb = "run"

    @property
    def label(self) -> str:
        return technique_code(self.technique).text.removeprefix("qlab.")

    def code(self) -> Code:
        made = technique_code(self.technique)
        if made.problem:
            return Code.missing(f"{made.text}.apply(sim, ...)", made.problem)
        arguments = ["sim"]
        for given, word, what in ((self.batches, "", "data"), (self.score, "score=", "score")):
            if given is None:
                continue
            if given.name is None:
                return Code.missing(f"{made.text}.apply(sim, ...)", f"its {what} has no name")
            arguments.append(word + given.name)
        applied = f"{made.text}.apply({', '.join(arguments)})"
        return Code.line(f"sim = {applied}.sim" if self.gives_sim else applied, made.imports)


@dataclass(frozen=True)
class Noticed(Action):
    """What was done in a cell between two looks, as one step."""

    actions: tuple[Action, ...]

    @property
    def verb(self) -> str:  # type: ignore[override]
        """That of the last action that is more than an edit, if there is one."""
        return next((a.verb for a in reversed(self.actions) if not isinstance(a, Edit)), self.actions[-1].verb)

    @property
    def label(self) -> str:
        larger = [action for action in self.actions if not isinstance(action, Edit)] or list(self.actions)
        return larger[0].label if len(larger) == 1 else f"{len(self.actions)} changes in a cell"

    def code(self) -> Code:
        return Code.joined(action.code() for action in self.actions)


@dataclass(frozen=True)
class Foreign(Action):
    """Something that was done to the sim by other code, of which only the fact is known."""

    what: str
    verb = "foreign"

    @property
    def label(self) -> str:
        return self.what

    def code(self) -> Code:
        return Code.missing(self.what, "the lab did not see how")


def action_of(entry: LogEntry, known: Mapping[str, object]) -> Action:
    """The action that a log entry tells of; `known` are names that data and score have in the script."""
    batches, score = (None if given is None else Named.find(given, known) for given in (entry.batches, entry.score))
    if isinstance(entry.what, Technique):
        return Apply(entry.what, batches, score)
    if entry.what == "calibrate" and batches is not None:
        return Calibrate(batches)
    return Foreign(f"{entry.what} in another process")


def edits_between(sim: QuantSim, before: Marks, after: Marks) -> list[Action]:
    """What leads from the settings of one moment to those of a later one, where nothing else happened in between."""
    found: list[Action] = []
    for name, new in after.settings.items():
        old, quantizer = before.settings[name], sim.quantizers[name]
        assert isinstance(quantizer, Quantizer)
        part = "weight" if isinstance(quantizer, WeightQuantizer) else "output"
        changed = {key: getattr(new.spec, key) for key in QuantSpec.__dataclass_fields__}
        changed = {key: plain(value) for key, value in changed.items() if value != getattr(old.spec, key)}
        if new.enabled != old.enabled:
            changed["enabled"] = new.enabled
        if old.frozen and not new.frozen:
            changed["frozen"] = False
        if changed:
            found.append(Set((quantizer.name,), part, changed))
        if new.encoding is not None and (changed or not new.encoding.equals(old.encoding)):
            found.append(SetEncoding(quantizer.name, part, new.encoding, True))
    if before.weights != after.weights:
        found.append(Foreign("weights were changed by other code"))
    return found


def _data(value: object) -> object:
    """What batches were made of, so that a loader is known again however it was wrapped."""
    return value.source if isinstance(value, Batches) else value


def quantizer_of(sim: QuantSim, layer: str, part: str) -> Quantizer:
    """The quantizer of one part of a layer; raises UnknownLayer or SpecError where there is none."""
    if part not in PARTS:
        raise SpecError(f"part must be 'weight' or 'output'; got {part!r}.")
    found = sim[layer]
    quantizer = getattr(found, part)
    if quantizer is None:
        what = "has no weight" if part == "weight" else f"has an output that stays float ({found.reason})"
        other = "output" if part == "weight" else "weight"
        raise SpecError(f"layer {layer!r} {what}: there is nothing to set. Its {other} may have settings.")
    return quantizer


def distinct(quantizers: Iterable[Quantizer]) -> list[Quantizer]:
    """Each quantizer once, in order."""
    return list({id(quantizer): quantizer for quantizer in quantizers}.values())


def _naming(layers: tuple[str, ...]) -> str:
    return layers[0] if len(layers) == 1 else f"{len(layers)} layers"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())
