"""All batches together through the layers, moving from one to the next: each weight is read once.

A technique that changes layers one after another needs, at each of them, its inputs in the float model and its inputs
in the sim as changed so far. `stream` keeps every batch at the same place in the graph, hands out the inputs of the
next chosen layer, and goes on when asked: the whole walk costs one pass of each model, whatever the number of layers.
`layer_by_layer` does the same for one model. Where weights are mapped from a file (qlab.mapped), memory holds one layer
at a time beside the activations.
"""

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.graph import Layer, call_layer, fill
from qlab.graph.layer_graph import Call
from qlab.progress import Progress, Silent
from qlab.sim.batches import Batches
from qlab.sim.placement import Role
from qlab.sim.quant_sim import QuantSim
from qlab.sim.tensor_file import write_tensors


@dataclass(frozen=True)
class Arguments:
    """What a layer is called with on one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Stop:
    """A layer about to be run, with its arguments for every batch: in the float model and in the sim.

    position: how many of the `total` chosen layers came before. What is changed in the sim's layer now is what the
    layers after it will see.
    """

    layer: Layer
    position: int
    total: int
    _states: "list[_State]"
    _walk: "_Walk"

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._states)

    def arguments(self) -> Iterator[tuple[Arguments, Arguments]]:
        """(float, quantized) arguments for each batch, in order. May be iterated more than once."""
        for state in self._states:
            yield self._walk.arguments(self.layer, state)

    def inputs(self, operand: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(float, quantized) values of one positional argument for each batch, in order."""
        for sides in self.arguments():
            x, xh = (side.args[operand] for side in sides)
            del sides
            yield x, xh
            del x, xh  # before the next batch is read


def stream(
    sim: QuantSim,
    batches: Any,
    layers: Collection[str],
    progress: Progress | None = None,
    max_bytes: int = 2 << 30,
    seen: Callable[[list[Any]], None] | None = None,
) -> Iterator[Stop]:
    """Stops before each of `layers` in order of execution, all batches at the same place.

    The sim runs in its present state at each step (activations without an encoding stay float). Values are freed after
    their last use; what exceeds `max_bytes` waits in a temporary file. seen: called with the flat inputs of each batch
    as it is read; batches are read once. Nothing after the last stop is run.
    """
    sim.graph.require_edges()
    chosen = sorted({sim.graph[name].index for name in layers})
    if not chosen:
        return
    with contextlib.ExitStack() as stack:
        walk = _Walk(sim, chosen[-1], (call_layer, partial(simulate, sim)))
        states: list[_State] = []
        store = _Store(stack, max_bytes)
        for flat in map(sim.inputs, Batches(batches)):
            if seen is not None:
                seen(flat)
            states.append(store.keep(walk.start(flat)))
        reached = 0
        for position, index in enumerate(chosen):
            layer = sim.graph.layers[index]
            with sim.evaluating():
                for number, state in enumerate(states):
                    (progress or Silent()).step(position, len(chosen), f"{layer.name}: data, batch {number}")
                    values = state.load()
                    walk.advance(values, reached, index)
                    states[number] = store.keep(values, state)
            reached = index
            yield Stop(layer, position, len(chosen), states, walk)


def layer_by_layer(
    sim: QuantSim, batches: Any, call: Call, at_batch: Callable[[int, int, int], None], max_bytes: int = 2 << 30
) -> int:
    """Runs all batches through the layers together, each computed by `call`; how many there were.

    at_batch(number, done, total) is called before work on a batch goes on; done and total count stretches of layers.
    Values are freed after their last use; what exceeds `max_bytes` waits in a temporary file.
    """
    heavy = [layer.index for layer in sim.graph if sim.placed[layer.name].weight is not None]
    stops = [*heavy[1:], len(sim.graph)]
    with contextlib.ExitStack() as stack, sim.evaluating():
        walk, store = _Walk(sim, len(sim.graph) - 1, (call,), runs_all=True), _Store(stack, max_bytes)
        states: list[_State] = []
        for number, flat in enumerate(map(sim.inputs, Batches(batches))):
            at_batch(number, 0, len(stops) + 1)
            states.append(store.keep(walk.start(flat)))
        reached = 0
        for position, index in enumerate(stops):
            for number, state in enumerate(states):
                at_batch(number, position + 1, len(stops) + 1)
                values = state.load()
                walk.advance(values, reached, index)
                states[number] = store.keep(values, state)
            reached = index
    return len(states)


def simulate(sim: QuantSim, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One layer as `sim.call` computes it, where an activation that was never calibrated stays float."""
    placed = sim.placed[layer.name]
    uncalibrated = placed.role is Role.QUANTIZED and placed.output is not None and placed.output.encoding is None
    return (sim.compute if uncalibrated else sim.call)(layer, args, kwargs)


Values = tuple[dict[int, Any], ...]
"""The live values of one batch by layer index, in each model: the float one and the sim, or in one alone."""


class _Walk:
    """Runs models from one layer to another, without gradient: one for each of `calls`.

    runs_all: layers whose values nobody uses are computed as well.
    """

    def __init__(self, sim: QuantSim, last: int, calls: tuple[Call, ...], runs_all: bool = False) -> None:
        self._sim, self._calls, self._runs_all = sim, calls, runs_all
        self._frees: dict[int, list[int]] = {}
        uses = {source.index: layer.index for layer in sim.graph.layers[: last + 1] for source in layer.inputs}
        for source, user in uses.items():
            self._frees.setdefault(user, []).append(source)
        self._needed = set(uses)

    @torch.no_grad()
    def start(self, flat: list[Any]) -> Values:
        """The values of the input layers of one batch."""
        given = list(zip(self._sim.graph.input_layers, flat, strict=True))
        return tuple({layer.index: call(layer, (value,), {}) for layer, value in given} for call in self._calls)

    @torch.no_grad()
    def advance(self, values: Values, start: int, stop: int) -> None:
        """Changes `values`: runs the layers from `start` up to, without, `stop`."""
        for layer in self._sim.graph.layers[start:stop]:
            needed = layer.index in self._needed
            if layer.kind not in ("input", "parameter") and (needed or self._runs_all):
                given = self._arguments(layer, values)
                for side, arguments, call in zip(values, given, self._calls, strict=True):
                    value = call(layer, arguments.args, arguments.kwargs)
                    if needed:
                        side[layer.index] = value
            for free in self._frees.get(layer.index, ()):
                for side in values:
                    side.pop(free, None)

    @torch.no_grad()
    def arguments(self, layer: Layer, state: "_State") -> tuple[Arguments, Arguments]:
        """(float, quantized) arguments of `layer`, which is the next to run."""
        of_float, of_sim = self._arguments(layer, state.load())
        return of_float, of_sim

    def _arguments(self, layer: Layer, values: Values) -> list[Arguments]:
        found = []
        for side, call in zip(values, self._calls, strict=True):
            # Parameters are read when used: a weight may have been rounded since its layer's turn.
            own = {s.index: call(s, (), {}) for s in layer.inputs if s.kind == "parameter"}
            known = {**side, **own} if own else side
            found.append(Arguments(fill(layer.args, known), fill(layer.kwargs, known)))  # type: ignore[arg-type]
        return found


@dataclass
class _State:
    """The live values of one batch: in memory, or in a file."""

    values: Values | None
    bytes: int
    file: Path | None = None
    rest: Any = None  # what remains of a filed state: its structure and everything that is no tensor

    def load(self) -> Values:
        if self.values is not None:
            return self.values
        assert self.file is not None
        leaves, spec, tensors = self.rest
        found = load_file(self.file)
        leaves = [found[tensors[i]] if i in tensors else leaf for i, leaf in enumerate(leaves)]
        return pytree.tree_unflatten(leaves, spec)


class _Store:
    """Keeps states in memory as long as they fit, then in files of a temporary folder, which `stack` removes."""

    def __init__(self, stack: contextlib.ExitStack, max_bytes: int) -> None:
        self._stack, self._max_bytes = stack, max_bytes
        self._folder: Path | None = None
        self._held = 0
        self._files = 0

    def keep(self, values: Values, before: _State | None = None) -> _State:
        """A state that holds `values`, in place of `before`."""
        if before is not None:
            self._held -= before.bytes if before.values is not None else 0
            if before.file is not None:
                before.file.unlink(missing_ok=True)
        size = _bytes(values)
        if self._held + size <= self._max_bytes:
            self._held += size
            return _State(values, size)
        leaves, spec = pytree.tree_flatten(values)
        tensors: dict[int, str] = {}
        saved: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                name = names.setdefault(id(leaf), str(position))
                saved[name], tensors[position] = leaf.contiguous().clone(), name
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="qlab-")))
        file = self._folder / f"{self._files}.safetensors"
        self._files += 1
        try:
            write_tensors(file, saved, {})
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: activations beyond the {self._max_bytes >> 20} MiB of memory allowed go to files. "
                "Allow more memory, free the disk or set TMPDIR to another one, or give fewer batches",
                str(file),
            ) from None
        rest = [None if i in tensors else leaf for i, leaf in enumerate(leaves)]
        return _State(None, size, file, (rest, spec, tensors))


def _bytes(values: Values) -> int:
    """Memory that the values hold; views of one tensor count once."""
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())
