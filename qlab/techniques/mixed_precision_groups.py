"""What must have one width: quantizers that share a grid, and for integer products a weight with what it multiplies."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from qlab.graph import Layer
from qlab.quantization import Quantizer
from qlab.sim import QuantSim
from qlab.sim.placement import matches_glob

Key = tuple[str, str]  # a quantizer: layer, part


@dataclass(frozen=True)
class Group:
    """Quantizers that have one width. name: the first layer's. work: what cost multiplies: numbers, or MACs."""

    name: str
    keys: tuple[Key, ...]
    work: float


def groups_of(sim: QuantSim, metric: str, skip: Iterable[str] = ()) -> list[Group]:
    """What moves together under a metric, in order of execution; skipped layers take their group with them."""
    entries = [e for e in sim.placed.values() if e.weight is not None and e.weight.enabled and not e.carries_weight]
    roots: dict[int, int] = {}
    members: dict[int, Quantizer] = {}

    def root(key: int) -> int:
        while roots.setdefault(key, key) != key:
            key = roots[key]
        return key

    work: dict[int, float] = {}  # by the weight quantizer of a layer
    for entry in entries:
        weight = entry.weight
        assert weight is not None
        members[id(weight)] = weight
        if metric == "size":
            work[id(weight)] = float(weight.weight.numel())
            continue
        work[id(weight)] = work.get(id(weight), 0.0) + multiply_accumulates(entry.layer)
        read = sim.input_quantizer(entry.layer)
        if read is not None and read.enabled:
            members[id(read)] = read
            roots[root(id(read))] = root(id(weight))
    together: dict[int, list[Quantizer]] = {}
    for key, quantizer in members.items():
        together.setdefault(root(key), []).append(quantizer)
    parts = {id(q): key.rpartition(":")[2] for key, q in sim.quantizers.items()}
    found = []
    for quantizers in together.values():
        keys = tuple((q.name, parts[id(q)]) for q in quantizers)
        if any(matches_glob(name, glob) for name, _ in keys for glob in skip):
            continue
        name = next(name for name, part in keys if part == "weight")
        found.append(Group(name, keys, sum(work.get(id(q), 0.0) for q in quantizers)))
    return found


def multiply_accumulates(layer: Layer) -> float:
    """Multiply-accumulates of one sample in a layer with a weight; a size that may change counts as 1."""
    source = layer.weight_source
    if source is None or layer.kind == "embedding":
        return 0.0
    weight, axis = getattr(source[0], source[1]), source[2]
    if layer.kind == "conv_transpose":  # every input meets the kernel of its channel
        return _elements(layer.inputs[0]) * weight.numel() / weight.shape[0]
    return _elements(layer) * weight.numel() / weight.shape[axis]


def _elements(layer: Layer) -> float:
    return float(math.prod(size or 1 for size in layer.shape or ()))
