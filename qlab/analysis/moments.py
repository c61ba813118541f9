"""Second moments of what each layer's weight multiplies: everything a rounding needs to know of the data.

With rows x of the float model, rows xh of the sim and y = W x (float, without bias), the mean squared error of any
quantized weight Q is E|y - Q xh|^2 = E|y|^2 - 2 tr(Q cross^T) + tr(Q gram Q^T): no pass over data is needed again when
bits, scheme or range change. Means give bias corrections the same way.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.graph import Layer, LinearForm, call_layer, linear_form
from qlab.progress import Progress, Silent
from qlab.sim import Batches, QuantSim
from qlab.sim.streaming import simulate

MAX_ROWS = 16384


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one layer, averaged over `rows` rows a group.

    Shapes (LinearForm): gram [groups, K, K] = E[xh xh^T]; cross [groups, M, K] = E[y xh^T]; energy [groups, M] =
    E[y^2]; mean_float, mean_quantized [groups, K] = E[x], E[xh]. seen: how many rows there were to sample from.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    mean_float: Tensor
    mean_quantized: Tensor
    rows: int
    seen: int

    @property
    def bytes(self) -> int:
        """Memory held."""
        parts = (self.gram, self.cross, self.energy, self.mean_float, self.mean_quantized)
        return sum(part.numel() * part.element_size() for part in parts)

    def error(self, matrix: Tensor) -> Tensor:
        """E[(y - Q xh)^2] of each output [groups, M] for a weight matrix Q [groups, M, K]."""
        q = matrix.double()
        quadratic = ((q @ self.gram.double()) * q).sum(-1)
        return (self.energy.double() - 2 * (q * self.cross).sum(-1) + quadratic).clamp_min(0)

    def of_rows(self, rows: slice) -> "Moments":
        """Those of some of the outputs M alone; nothing is copied."""
        return replace(self, cross=self.cross[:, rows], energy=self.energy[:, rows])

    def of_equal_inputs(self, matrix: Tensor) -> "Moments":
        """The moments if the float model had the sim's inputs: nothing to make up for. matrix: the float weight."""
        cross = (matrix.double() @ self.gram.double()).to(self.cross.dtype)
        energy = (cross * matrix).sum(-1)
        return replace(self, cross=cross, energy=energy, mean_float=self.mean_quantized)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Moments":
        return self  # never changed


class MomentSums:
    """Adds up the moments of one layer, batch by batch.

    batches: how many will come; they share `max_rows` evenly, and a batch with more rows is sampled by `seed`.
    """

    def __init__(self, layer: Layer, batches: int, max_rows: int = MAX_ROWS, seed: int = 0) -> None:
        form = linear_form(layer)
        if form is None or layer.weight_source is None:
            raise InputError(f"layer {layer.name!r} ({layer.title}) is no product with a weight: it has no moments.")
        owner, attribute, _ = layer.weight_source
        self.form: LinearForm = form
        self._weight = form.matrix(getattr(owner, attribute).detach()).float()
        self._rows_a_batch = max(max_rows // max(batches, 1), 1)
        self._generator = torch.Generator().manual_seed(seed)
        groups, outputs, inputs = self._weight.shape
        new = self._weight.new_zeros
        self._gram, self._cross = new(groups, inputs, inputs), new(groups, outputs, inputs)
        self._energy, self._float, self._quantized = new(groups, outputs), new(groups, inputs), new(groups, inputs)
        self._rows = self._seen = 0

    @staticmethod
    def bytes(layer: Layer) -> int:
        """Memory that the sums of `layer` take."""
        form = linear_form(layer)
        return 0 if form is None else 4 * form.groups * form.inputs * (form.inputs + form.outputs + 2)

    def choose(self, x: Tensor) -> Tensor | None:
        """The indices of the rows of `x` to look at, None for all; drawn anew at each call."""
        positions = self.form.positions(x)
        self._seen += positions
        if positions <= self._rows_a_batch:
            return None
        return torch.randperm(positions, generator=self._generator)[: self._rows_a_batch].to(x.device)

    @torch.no_grad()
    def add(self, rows_float: Tensor, rows_quantized: Tensor | None = None) -> None:
        """Adds rows [groups, n, K] of the float model and the same rows of the sim (None: they are the float ones)."""
        x = rows_float.float()
        xh = x if rows_quantized is None else rows_quantized.float()
        y = x @ self._weight.transpose(1, 2)
        self._gram.baddbmm_(xh.transpose(1, 2), xh)
        self._cross.baddbmm_(y.transpose(1, 2), xh)
        self._energy += y.square().sum(1)
        self._float += x.sum(1)
        self._quantized += xh.sum(1)
        self._rows += x.shape[1]

    def moments(self) -> Moments | None:
        """The moments, None where no row was seen. The sums become the means: nothing can be added afterwards."""
        if not self._rows:
            return None
        sums = (self._gram, self._cross, self._energy, self._float, self._quantized)
        gram, cross, energy, exact, quantized = (total.div_(self._rows) for total in sums)
        return Moments(gram, cross, energy, exact, quantized, self._rows, self._seen)


def collect_moments(
    sim: QuantSim,
    batches: Any,
    layers: Collection[str] | None = None,
    progress: Progress | None = None,
    quantized: bool = True,
    max_rows: int = MAX_ROWS,
    max_bytes: int = 2 << 30,
    seed: int = 0,
) -> dict[str, Moments]:
    """The moments of `layers` (all with a weight, when None) in the sim's present state; changes nothing.

    quantized False takes both sides from the float model. One pass over the data, or as many as keep the sums under
    `max_bytes`. Layers that saw no row, and those that are no matrix product (embeddings), are left out.
    """
    data, progress = Batches(batches), progress or Silent()
    number = len(data) or sum(1 for _ in data)
    if not number:
        raise InputError("moments need at least one batch; the iterable was empty.")
    names = [layer.name for layer in sim.graph] if layers is None else [sim[name].name for name in layers]
    wanted = [sim.graph[name] for name in names if linear_form(sim.graph[name]) is not None]
    chunks: list[list[Layer]] = [[]]
    for layer in wanted:
        if chunks[-1] and sum(map(MomentSums.bytes, [*chunks[-1], layer])) > max_bytes:
            chunks.append([])
        chunks[-1].append(layer)
    found: dict[str, Moments] = {}
    for turn, chunk in enumerate(chunks):
        sums = {layer.index: MomentSums(layer, number, max_rows, seed) for layer in chunk}
        for position, batch in enumerate(data):
            progress.step(turn * number + position, len(chunks) * number, f"moments, batch {position}")
            _add_batch(sim, sim.inputs(batch), sums, quantized)
        found |= {layer.name: m for layer in chunk if (m := sums[layer.index].moments()) is not None}
    return found


@torch.no_grad()
def _add_batch(sim: QuantSim, flat: list[Any], sums: dict[int, MomentSums], quantized: bool) -> None:
    """Changes `sums`: adds one batch. The float rows are kept until the sim has produced the same rows."""
    chosen: dict[int, tuple[Tensor | None, Tensor]] = {}

    def record_float(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (own := sums.get(layer.index)) is not None:
            x = args[own.form.operand]
            index = own.choose(x)
            rows = own.form.rows(x, index)
            if quantized:
                chosen[layer.index] = index, rows
            else:
                own.add(rows)
        return call_layer(layer, args, kwargs)

    def record_sim(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layer.index in chosen:
            own, (index, rows) = sums[layer.index], chosen.pop(layer.index)
            own.add(rows, own.form.rows(args[own.form.operand], index))
        return simulate(sim, layer, args, kwargs)

    with sim.evaluating():
        sim.graph.run(flat, record_float)
        if quantized:
            sim.graph.run(flat, record_sim)
