"""Runs many cases on the same batches, each from the first layer that differs: the sum of suffixes, not of forwards.

Values of the float run serve every 'enabled' case, values of the fully quantized run every 'disabled' one. Results are
those of full runs, bit for bit (Replay).
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from qlab.analysis.bits import Bits
from qlab.analysis.cases import Case
from qlab.analysis.shadow import shadow
from qlab.analysis.units import acting_layers
from qlab.graph import Layer, Replay
from qlab.sim import QuantSim

_QUANTIZED = ("both", "disabled")  # modes that start from the values of the fully quantized run


@dataclass(frozen=True)
class Work:
    """What was computed: calls of layers, and their work in units of a full forward of one batch."""

    layer_calls: int = 0
    forwards: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.layer_calls + other.layer_calls, self.forwards + other.forwards)


class Sweep:
    """The cases of one analysis of one sim; `sim` is never changed.

    max_bytes: budget for remembered values, shared by the float and the quantized run; exceeded, it is slower.
    """

    def __init__(self, sim: QuantSim, cases: Sequence[Case], max_bytes: int = 1 << 30) -> None:
        self.cases = list(cases)
        self.work = Work()
        self._max_bytes = max_bytes
        widths = dict.fromkeys(case.bits for case in cases if case.bits is not None) or {Bits(): None}
        self._shadows = {bits: shadow(sim, bits) for bits in widths}
        self._default = next(iter(self._shadows))
        self._on: Set[str] = {key for key, quantizer in self.sim.quantizers.items() if quantizer.enabled}
        self._is_on: dict[Bits, Set[str]] = dict.fromkeys(self._shadows, self._on)
        self._changed = self._changes()
        self._kept = self._boundaries()
        self._now: tuple[Bits, QuantSim] = self._default, self.sim

    @property
    def sim(self) -> QuantSim:
        """A shadow, for what needs the graph alone."""
        return self._shadows[self._default]

    def switch_to(self, case: Case) -> QuantSim:
        """The shadow on which this case holds; valid until the next call."""
        bits = case.bits or self._default
        twin = self._shadows[bits]
        wanted = case.quantized(self._on)
        for key in wanted ^ self._is_on[bits]:
            twin.quantizers[key].enabled = key in wanted
        self._is_on[bits] = wanted
        self._now = bits, twin
        return twin

    @torch.no_grad()
    def outputs(self, batches: Sequence[Any], cases: Sequence[Case] | None = None) -> Iterator[tuple[Case, list[Any]]]:
        """(case, the model's result on each batch) for every case: one bit width after the other, and of each the cases
        that are nearly float before those that are nearly all quantized, so that few quantizers are switched between
        two of them, and few weights rounded anew."""
        flat = [self.sim.inputs(batch) for batch in batches]
        asked = list(self.cases if cases is None else cases)
        of_float = self._replay(flat, Case("float"))
        for bits in dict.fromkeys(case.bits for case in asked):
            own = [case for case in asked if case.bits == bits]
            yield from self._run([case for case in own if case.mode not in _QUANTIZED], of_float)
            if quantized := [case for case in own if case.mode in _QUANTIZED]:
                of_sim = self._replay(flat, Case("both", bits))
                yield from self._run(quantized, of_sim)
                self._count(of_sim)
        self._count(of_float)

    def _run(self, cases: list[Case], replay: Replay) -> Iterator[tuple[Case, list[Any]]]:
        for case in cases:
            self.switch_to(case)
            yield case, replay.outputs_if(self._changed[case])

    def _replay(self, flat: list[Any], case: Case) -> Replay:
        """A replay that remembers the values of `case`."""
        kept = self._kept
        replay = Replay(
            self.sim.graph,
            flat,
            lambda layer, args, kwargs: self._now[1].call(layer, args, kwargs),
            lambda layer: None,  # it remembers one state
            keeps=lambda layer: layer.index in kept,
            max_bytes=self._max_bytes // 2,
        )
        self.switch_to(case)
        replay.outputs()
        return replay

    def _changes(self) -> dict[Case, frozenset[int]]:
        """By case the layers that compute something else than in the one whose remembered values it starts from."""
        known: dict[frozenset[str], frozenset[int]] = {}  # 'enabled' and 'disabled' switch the same, at all widths
        found = {}
        for case in self.cases:
            base = self._on if case.mode in _QUANTIZED else frozenset()
            switched = frozenset(case.quantized(self._on) ^ base)
            if switched not in known:
                known[switched] = frozenset(self.sim.graph.downstream(acting_layers(self.sim, switched)))
            found[case] = known[switched]
        return found

    def _boundaries(self) -> set[int]:
        """The layers whose values some case starts from: what changed layers read from unchanged ones; and results."""
        graph, kept = self.sim.graph, {layer.index for layer in self.sim.graph.outputs if isinstance(layer, Layer)}
        for changed in set(self._changed.values()):
            kept |= {source.index for index in changed for source in graph.layers[index].inputs} - changed
        return kept

    def _count(self, replay: Replay | None) -> None:
        if replay is not None:
            self.work += Work(replay.counts.layer_calls, replay.counts.forwards)
