"""Fixes: what could be changed at one layer, as data and as an action, with the gain that a trial showed."""

import copy
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from qlab.analysis.divergence import Divergence, decibel
from qlab.analysis.group import Group
from qlab.analysis.precision import difference
from qlab.analysis.shadow import shadow
from qlab.errors import QlabError
from qlab.graph import Layer, Replay
from qlab.progress import Progress, Silent
from qlab.quantization import Quantizer, Scheme
from qlab.sim import QuantSim, Role
from qlab.sim.integer_kernels import requantizer

WIDTHS = (4, 6, 8, 16)


@dataclass(frozen=True)
class Fix:
    """One change that would help.

    verb, arguments: the change as data, a call of a Lab: 'set' with layers, part and settings, or 'run' with the name
    of a technique and its settings. predicted_gain: change of the SQNR of the model's result in dB, tried on the
    batches of the diagnosis with all else as it is, and its standard error over samples.
    """

    label: str
    verb: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    predicted_gain: float = math.nan
    gain_error: float = math.nan

    def apply(self, sim: QuantSim, batches: Any = None) -> None:
        """Changes `sim`: does it. batches: for a technique that needs data. Through a Lab, use `perform`."""
        if self.verb == "run":
            self.technique().apply(sim, batches)
            return
        settings = {key: value for key, value in self.arguments.items() if key not in ("layers", "part")}
        getattr(sim[self.arguments["layers"]], self.arguments["part"]).set(**settings)

    def perform(self, lab: Any) -> Any:
        """Does it through a Lab, so that it is journaled and can be undone; returns the Job of a technique."""
        if self.verb == "run":
            return lab.start(self.technique())
        return getattr(lab, self.verb)(**self.arguments)

    def to_html(self, measured: tuple[float, float] | None = None) -> str:
        """What it is and what it gains, predicted and, where it was done, measured (gain, error); escaped."""
        gain = f"{_decibels(self.predicted_gain, self.gain_error)} of the result"
        if measured is not None:
            gain += f" predicted, {_decibels(*measured)} measured when done"
        return f"{escape(self.label)} <small class='qlab-quiet'>{gain}</small>"

    def technique(self) -> Any:
        """The technique that a 'run' fix runs."""
        # by name, as a script would: techniques stand above analyses and use them
        public = importlib.import_module("qlab")
        return getattr(public, self.arguments["technique"])(**self.arguments["settings"])


def _decibels(gain: float, error: float) -> str:
    return f"{gain:+.2f} dB" if math.isnan(error) else f"{gain:+.2f} ± {error:.2f} dB"


def possible_fixes(group: Group, parts: Mapping[str, float]) -> list[Fix]:
    """What might help `group`, parts being shares of its error; nothing is tried yet."""
    found: list[Fix] = []
    if group.weight is not None and group.weight.enabled:
        found += _fixes_of(group.weight, "weight", parts["weight clipping"] > parts["weight rounding"])
    if group.output is not None and group.output.enabled and group.last.kind != "parameter":
        found += _fixes_of(group.output, "output", parts["output clipping"] > parts["output rounding"])
    if group.weight is not None and group.weight.enabled and group.weight.granularity.kind == "per_tensor":
        arguments = {"technique": "CrossLayerEqualization", "settings": {}}
        found.append(Fix("equalize channels across layers (CLE)", "run", arguments))
    return found


def _fixes_of(quantizer: Quantizer, part: str, is_clipped: bool) -> Iterator[Fix]:
    def fix(label: str, **settings: Any) -> Fix:
        return Fix(f"{quantizer.name} {part}: {label}", "set", {"layers": quantizer.name, "part": part, **settings})

    spec = quantizer.spec
    if part == "weight" and spec.granularity.kind == "per_tensor":
        yield fix("one scale per channel", granularity="per_channel")
    rules = ("min_max", "percentile", "mse", "sqnr") if part == "output" else ("min_max", "mse", "sqnr")
    if spec.known_range is None and (part == "weight" or not quantizer.statistics.is_empty):
        for rule in rules:
            if rule != spec.rule.name:
                yield fix(f"{rule} range", rule=rule)
    if part == "output" and spec.scheme is not Scheme.ASYMMETRIC and spec.known_range is None:
        yield fix("asymmetric grid", scheme="asymmetric")
    wider = [width for width in WIDTHS if width > spec.bits]
    for width in wider[:2]:
        yield fix(f"{width} bits", bits=width)
    yield fix("keep in float", enabled=False)


class Before:
    """The model's results on some batches before any fix: what a fix is compared with, tried or done."""

    def __init__(self, batches: Sequence[Any], in_float: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.batches = list(batches)
        self._reference = list(map(Divergence, in_float))
        self._rows = self._compared(outputs)

    def gain(self, outputs: Sequence[Any]) -> tuple[float, float]:
        """What other results on these batches gain, in dB of SQNR, and its standard error over samples."""
        return difference(decibel, self._compared(outputs), self._rows)

    @torch.no_grad()
    def gain_of(self, sim: QuantSim) -> tuple[float, float]:
        """`gain` of a sim as it is now, by full runs."""
        with sim.evaluating():
            return self.gain([sim.output(batch) for batch in self.batches])

    def _compared(self, outputs: Sequence[Any]) -> Tensor:
        return torch.cat([wanted.rows(output) for wanted, output in zip(self._reference, outputs, strict=True)])


class Trials:
    """Tries fixes on fixed batches, each from the layer that it changes; `sim` itself is not touched."""

    def __init__(self, sim: QuantSim, batches: Sequence[Any], max_bytes: int = 1 << 30) -> None:
        self._original = sim
        self._sim = shadow(sim)
        self._tried: dict[int, int] = {}  # a quantizer to the number of the fix that it is set to
        self._replay = Replay(
            self._sim.graph,
            [self._sim.inputs(batch) for batch in batches],
            self._sim.call,
            self._fingerprint,
            max_bytes=max_bytes,
            full_share=1.0,
        )
        with torch.no_grad():
            in_float = [self._sim.float_output(batch) for batch in batches]
            self.before = Before(batches, in_float, self._replay.outputs())

    def tried(self, fixes: Sequence[Fix], progress: Progress | None = None) -> list[Fix]:
        """The fixes with their gains, the best first; those that cannot be made are left out."""
        found = []
        for number, fix in enumerate(fixes):
            (progress or Silent()).step(number, len(fixes), f"trying {fix.label}")
            outputs = self._technique(fix) if fix.verb == "run" else self._setting(fix, number + 1)
            if outputs is not None:
                gain, error = self.before.gain(outputs)
                found.append(replace(fix, predicted_gain=gain, gain_error=error))
        return sorted(found, key=lambda fix: -fix.predicted_gain if math.isfinite(fix.predicted_gain) else math.inf)

    @torch.no_grad()
    def _setting(self, fix: Fix, number: int) -> list[Any] | None:
        quantizer: Quantizer = getattr(self._sim[fix.arguments["layers"]], fix.arguments["part"])
        state = quantizer.state()
        try:
            fix.apply(self._sim)
            if quantizer.enabled and quantizer.encoding is None:
                return None
            self._tried[id(quantizer)] = number
            return self._replay.outputs(commit=False)
        except QlabError:
            return None
        finally:
            self._tried.pop(id(quantizer), None)
            quantizer.set_state(state)

    def _technique(self, fix: Fix) -> list[Any] | None:
        twin = copy.deepcopy(self._original)
        try:
            fix.apply(twin, self.before.batches)
        except (QlabError, AttributeError):
            return None
        with twin.evaluating(), torch.no_grad():
            return [twin.output(batch) for batch in self.before.batches]

    def _fingerprint(self, layer: Layer) -> tuple[int, ...]:
        entry = self._sim.placed[layer.name]
        own = (entry.weight, entry.output if entry.role is Role.QUANTIZED else None)
        grid = self._sim.input_quantizer(layer) if entry.weight is not None else None  # of an int32 bias
        written = requantizer(self._sim, layer) if self._sim.preset.int32_bias else None
        return tuple(self._tried.get(id(quantizer), 0) for quantizer in (*own, grid, written))
