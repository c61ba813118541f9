"""Incremental execution: values of probe batches are remembered, and only what a change reaches is run again.

Every layer has a key: its own fingerprint (given by the caller) and the keys of its inputs. A stored value counts as
long as its key does, so results are those of a full run, bit for bit; a value that is not stored, for lack of memory,
is computed again from what is.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.graph.example import cloned
from qlab.graph.layer_graph import Call, Layer, LayerGraph, fill

Fingerprint = Callable[[Layer], Hashable]


@dataclass
class ReplayCounts:
    """What a replay has done: calls of layers, their work in units of a full forward, full forwards, bytes kept."""

    layer_calls: int = 0
    forwards: float = 0.0
    full_forwards: int = 0
    bytes_kept: int = 0


@dataclass
class _Stored:
    inputs: list[Any]
    values: dict[int, Any] = field(default_factory=dict)  # layer index to value
    keys: dict[int, int] = field(default_factory=dict)  # layer index to the key its value belongs to
    bypassed: bool = False  # the last request ran the whole graph without storing


class Replay:
    """Runs a graph on fixed probe batches again and again while layers change.

    batches: flat inputs, one list a batch (see LayerGraph.bind). call: computes a layer. fingerprint: a value that
    changes whenever the layer itself would compute something else. keeps: which layers are worth remembering.
    max_bytes: budget for remembered values. A change whose re-run covers more than `full_share` of the work runs the
    whole graph without storing, once; when the next request is no better off, values are stored anew.
    """

    def __init__(
        self,
        graph: LayerGraph,
        batches: Iterable[Sequence[Any]],
        call: Call,
        fingerprint: Fingerprint,
        keeps: Callable[[Layer], bool] = lambda layer: True,
        max_bytes: int = 1 << 30,
        full_share: float = 0.8,
    ) -> None:
        self.graph = graph
        self.call = call
        self.fingerprint = fingerprint
        self.keeps = keeps
        self.max_bytes = max_bytes
        self.full_share = full_share
        self.counts = ReplayCounts()
        self._batches = [_Stored(list(batch)) for batch in batches]
        self._shares = work_shares(graph)

    def __len__(self) -> int:
        return len(self._batches)

    def outputs(self, commit: bool = True) -> list[Any]:
        """The model's result for every probe batch in the present state.

        commit False asks 'what if': remembered values stay those of the state before.
        """
        return [self.output(index, commit) for index in range(len(self._batches))]

    def output(self, batch: int, commit: bool = True) -> Any:
        """The model's result for one probe batch; see `outputs`."""
        values = self._run(self._batches[batch], {o.index for o in self.graph.outputs if isinstance(o, Layer)}, commit)
        return self.graph.result(values)

    def outputs_if(self, changed: Set[int]) -> list[Any]:
        """The model's result for every probe batch if some layers compute something else than what is remembered.

        changed: their indices, and those of all that depends on them. What is remembered stays; no key is computed.
        """
        results = {o.index for o in self.graph.outputs if isinstance(o, Layer)}
        found = []
        for stored in self._batches:
            run = self._needed(results, stored.keys.keys() - changed)
            found.append(self.graph.result(self._execute(stored, run, [], results, commit=False)))
        return found

    def value(self, batch: int, name: str) -> Any:
        """The value of one layer for one probe batch."""
        index = self.graph[name].index
        return self._run(self._batches[batch], {index}, commit=True)[index]

    def keys(self) -> list[int]:
        """The present key of every layer."""
        keys: list[int] = []
        for layer in self.graph.layers:
            keys.append(hash((layer.index, self.fingerprint(layer), *[keys[i.index] for i in layer.inputs])))
        return keys

    def forget(self) -> None:
        """Drops all remembered values, freeing their memory."""
        for stored in self._batches:
            stored.values.clear()
            stored.keys.clear()
        self.counts.bytes_kept = 0

    def _run(self, stored: _Stored, wanted: set[int], commit: bool) -> list[Any]:
        keys = self.keys()
        if self.graph.runs_whole:
            return self._run_whole(stored, wanted, keys, commit)
        run = self._needed(wanted, {index for index, key in stored.keys.items() if key == keys[index]})
        bypass = False
        if commit and stored.values and self._share(run) > self.full_share:
            bypass = not stored.bypassed
            stored.bypassed = True
        elif commit:
            stored.bypassed = False
        if bypass or (not commit and self._share(run) > self.full_share):
            run = self._needed(wanted, set())
            self.counts.full_forwards += 1
            commit = False
        return self._execute(stored, run, keys, wanted, commit)

    def _needed(self, wanted: set[int], known: Set[int]) -> list[bool]:
        """Which layers must run so that `wanted` layers have values, those of some being known."""
        needed = [index in wanted for index in range(len(self.graph))]
        run = [False] * len(self.graph)
        for layer in reversed(self.graph.layers):
            index = layer.index
            if needed[index] and index not in known:
                run[index] = True
                for source in layer.inputs:
                    needed[source.index] = True
        return run

    def _execute(self, stored: _Stored, run: list[bool], keys: list[int], wanted: set[int], commit: bool) -> list[Any]:
        values: list[Any] = [None] * len(self.graph)
        for index in wanted:
            if not run[index]:
                values[index] = stored.values[index]
        running = [layer for layer in self.graph.layers if run[layer.index]]
        waiting = [0] * len(self.graph)  # uses of a value that are still to come
        for layer in running:
            for source in layer.inputs:
                waiting[source.index] += 1
                if not run[source.index]:
                    values[source.index] = stored.values[source.index]
        inputs = {layer.index: value for layer, value in zip(self.graph.input_layers, stored.inputs, strict=True)}
        for layer in running:
            index = layer.index
            args = (inputs[index],) if layer.kind == "input" else fill(layer.args, values)
            values[index] = self.call(layer, args, fill(layer.kwargs, values) if layer.kwargs else {})
            self.counts.layer_calls += 1
            self.counts.forwards += self._shares[index]
            if commit:
                self._store(stored, layer, values[index], keys[index])
            for source in layer.inputs:
                waiting[source.index] -= 1
                if not waiting[source.index] and source.index not in wanted:
                    values[source.index] = None
        return values

    def _run_whole(self, stored: _Stored, wanted: set[int], keys: list[int], commit: bool) -> list[Any]:
        """The values of `wanted`, all others None, for a graph whose layers run together only."""
        key = hash(tuple(keys))
        values: list[Any] = [None] * len(self.graph)
        if all(stored.keys.get(index) == key for index in wanted):
            for index in wanted:
                values[index] = stored.values[index]
            return values

        def call(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = self.call(layer, args, kwargs)
            if layer.index in wanted:
                values[layer.index] = cloned(value)  # the model's code may write to it
            return value

        self.graph.run(stored.inputs, call)
        self.counts.full_forwards += 1
        self.counts.forwards += 1
        self.counts.layer_calls += len(self.graph)
        if commit:
            for index in wanted:
                self._store(stored, self.graph.layers[index], values[index], key)
        return values

    def _store(self, stored: _Stored, layer: Layer, value: Any, key: int) -> None:
        """Remembers a value if it fits; room taken by the same layer's old value counts as free."""
        before = _bytes(stored.values.pop(layer.index, None))
        stored.keys.pop(layer.index, None)
        self.counts.bytes_kept -= before
        if not (self.keeps(layer) or layer.kind == "input"):
            return
        size = _bytes(value)
        if self.counts.bytes_kept + size > self.max_bytes:
            return
        stored.values[layer.index] = value
        stored.keys[layer.index] = key
        self.counts.bytes_kept += size

    def _share(self, run: list[bool]) -> float:
        """The share of the graph's work that the layers to run stand for."""
        return min(sum(share for share, runs in zip(self._shares, run, strict=True) if runs), 1.0)


def _bytes(value: Any) -> int:
    return sum(v.numel() * v.element_size() for v in pytree.tree_leaves(value) if isinstance(v, Tensor))


def work_shares(graph: LayerGraph) -> list[float]:
    """The share of each layer in the work of one forward, by multiply-accumulates and elements produced."""
    work = [_work(layer) for layer in graph]
    total = sum(work)
    return [part / total if total else 1 / len(work) for part in work]


def _work(layer: Layer) -> float:
    """A rough cost of one sample: multiply-accumulates, and ten for every element that is produced."""
    if layer.shape is None or layer.kind in ("input", "parameter"):
        return 0.0
    elements = float(torch.tensor([d or 1 for d in layer.shape]).prod())
    source = layer.weight_source
    per_output = 0.0
    if source is not None and layer.kind != "embedding":
        weight = getattr(source[0], source[1])
        per_output = weight.numel() / max(weight.shape[source[2]], 1)
    return elements * (per_output + 10)
