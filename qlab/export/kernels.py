"""Where a target's integers leave the simulation's: layer by layer, and which kernel of the runtime is the reason.

Each layer is compared twice. As it runs, where the differences of all layers before it are among its inputs; and
alone, the sim given the very inputs that the layer had on target: what differs then is how that kernel rounds.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.export.runtime import Target
from qlab.export.tensors import governed
from qlab.graph import Layer
from qlab.progress import Progress
from qlab.quantization import Encoding, dequantize, quantize
from qlab.sim import QuantSim
from qlab.sim.batches import Batches

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

COLUMNS = ("layer", "kind", "kernel", "values", "differing", "largest", "differing_alone", "largest_alone")
_LARGEST_BYTES = 1_900_000_000  # a serialised model holds 2 GiB
_LONGEST = 4  # operators named of one kernel


@dataclass
class _Count:
    values: int = 0
    differing: int = 0
    largest: int = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        steps = (ours - theirs).abs()
        self.values += steps.numel()
        self.differing += int(steps.count_nonzero())
        self.largest = max(self.largest, int(steps.max()) if steps.numel() else 0)


def layer_table(
    sim: QuantSim, path: Path, batches: Batches, optimised: bool, threads: int, progress: Progress
) -> pd.DataFrame:
    """One row a layer whose integers the file holds: the columns of COLUMNS, counts over all batches."""
    grids = {layer.name: q.required_encoding() for layer, _, q in governed(sim)}
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimised.onnx"
        model, names = _tapped(path, grids)
        target = Target(sim, model.SerializeToString(), optimised, threads, written)
        kernels = _kernels(_load(written) if written.exists() else model, names)
    running, alone = ({name: _Count() for name in names} for _ in range(2))
    for number, batch in enumerate(batches):
        progress.step(number, max(number + 1, len(batches)), "comparing layers")
        flat = sim.inputs(batch)
        integers = target.run(flat, [f"{name}_q" for name in names])
        theirs = {name: value.to(torch.int32) for name, value in zip(names, integers, strict=True)}
        sim.graph.run(flat, _Comparing(sim, grids, theirs, running, forced=False))
        sim.graph.run(flat, _Comparing(sim, grids, theirs, alone, forced=True))
    rows = [
        (name, sim.graph[name].kind, kernels[name], running[name].values, running[name].differing)
        + (running[name].largest, alone[name].differing, alone[name].largest)
        for name in names
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def kernel_table(layers: pd.DataFrame) -> pd.DataFrame:
    """One row a kernel that rounds differently, given the same inputs: its layers, values and the largest step."""
    own = layers[layers["differing_alone"] > 0]
    found = own.groupby("kernel", sort=False).agg(
        layers=("layer", "count"),
        values=("values", "sum"),
        differing=("differing_alone", "sum"),
        largest=("largest_alone", "max"),
        first=("layer", "first"),
    )
    return found.reset_index().sort_values("differing", ascending=False, ignore_index=True)


class _Comparing:
    """Runs the sim and counts where its integers are not the target's; `forced`, it goes on with the target's."""

    def __init__(
        self,
        sim: QuantSim,
        grids: dict[str, Encoding],
        theirs: dict[str, Tensor],
        counts: dict[str, _Count],
        forced: bool,
    ) -> None:
        self._sim, self._grids, self._theirs, self._counts, self._forced = sim, grids, theirs, counts, forced

    def __call__(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = self._sim.call(layer, args, kwargs)
        theirs = self._theirs.get(layer.name)
        if theirs is None:
            return value
        grid = self._grids[layer.name]
        self._counts[layer.name].add(quantize(value, grid).cpu(), theirs)
        return dequantize(theirs.to(value.device), grid) if self._forced else value


def _tapped(path: Path, grids: dict[str, Encoding]) -> tuple["ModelProto", list[str]]:
    """The file with the integers of each layer among its results, and the names of those layers, in order."""
    from onnx import helper

    if path.stat().st_size > _LARGEST_BYTES:
        raise InputError(f"{path} is too large to look into layer by layer; call with layers=False.")
    model = _load(path)
    given = {value.name for value in model.graph.output}
    quantized = {node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    names = [name for name in grids if f"{name}_q" in quantized]
    model.graph.output.extend(
        helper.make_empty_tensor_value_info(f"{name}_q") for name in names if f"{name}_q" not in given
    )
    return model, names


def _kernels(model: "ModelProto", names: list[str]) -> dict[str, str]:
    """The operators that compute each layer's integers from those of the layers before it."""
    producers = {name: node for node in model.graph.node for name in node.output}
    ends = {f"{name}_q" for name in names}
    return {name: _operators(f"{name}_q", producers, ends) for name in names}


def _operators(tensor: str, producers: dict[str, "NodeProto"], ends: set[str]) -> str:
    node = producers.get(tensor)
    while node is not None and node.op_type == "Transpose" and node.input[0] not in ends:
        node = producers.get(node.input[0])  # kernels that keep channels last, and the way back
    if node is None:
        return "?"
    if node.op_type != "QuantizeLinear":
        return node.op_type
    words: list[str] = []
    seen, pending = set(), [node.input[0]]
    while pending:
        name = pending.pop(0)
        node = producers.get(name)
        if node is None or name in seen or name in ends or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        seen.add(name)
        words.insert(0, node.op_type)
        pending += node.input
    words = list(dict.fromkeys(words))
    return "+".join([*words[-_LONGEST:], "QuantizeLinear"])


def _load(path: Path) -> "ModelProto":
    import onnx

    return onnx.load(str(path))
