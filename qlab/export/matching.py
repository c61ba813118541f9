"""Which layer of a sim a file means: names of ONNX tensors, of modules, or made up by an exporter, to layers.

Tried in this order, each only where the one before finds nothing: a mapping that the person gives; the layer's or
parameter's own name; '/path/Op_output_0', module path and operator, as TorchScript's exporter writes; 'relu_1', the
operator counted in order of execution, as the dynamo exporter writes; last, for names that nobody chose ('29', 't.1'),
the place in the order of execution, where only one layer can be meant.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qlab.errors import UnknownLayer, nearest
from qlab.export.encodings_file import EncodingsFile, Entry
from qlab.export.tensors import ParameterNames, bias_name
from qlab.graph import Layer
from qlab.graph.onnx_kinds import kinds_of
from qlab.sim import QuantSim, Role

_HINTED = 100
"""Entries without a place that nearest names are looked for: a file may have a million."""
_MADE_UP = re.compile(r"\d+|[a-z]\w*\.\d+|quantize_dequantize(_\d+)?|_?val_\d+|onnx::\w+")


@dataclass(frozen=True)
class Target:
    """What a name stands for: the output of a layer, or a layer's weight or bias."""

    layer: str
    part: str  # 'output', 'weight' or 'bias'

    def __str__(self) -> str:
        return self.layer if self.part == "output" else f"{self.layer} ({self.part})"


@dataclass(frozen=True)
class Matched:
    """The targets of a file's entries by label, and why the others have none."""

    targets: dict[str, Target]
    unmatched: dict[str, str]


def match(sim: QuantSim, file: EncodingsFile, names: Mapping[str, str] | None = None) -> Matched:
    """The layers that the entries of `file` mean. names: layer or parameter names by the file's names, where known.

    Raises UnknownLayer where `names` leads to nothing.
    """
    finder = Finder(sim, names or {})
    targets: dict[str, Target] = {}
    for entry in file.entries:
        found = finder.of_module(entry) if entry.side is not None else finder.of_tensor(entry.name)
        if found is not None:
            targets[entry.label] = found
    if file.in_order:
        _place_between(sim, file.entries, targets)
    _place_last(sim, file.entries, targets)
    left = [entry for entry in file.entries if entry.label not in targets]
    unmatched = {e.label: finder.hint(e.name) for e in left[:_HINTED]}
    unmatched |= dict.fromkeys((e.label for e in left[_HINTED:]), f"One of {len(left):,} such entries.")
    return Matched(targets, unmatched)


class Finder:
    """Finds what single names stand for."""

    def __init__(self, sim: QuantSim, names: Mapping[str, str]) -> None:
        self._graph = sim.graph
        self._parameters = _parameters(sim)
        self._given: dict[str, Target] = {}
        for name, meant in names.items():
            target = self._own_name(meant)
            if target is None:
                raise UnknownLayer(f"names={{{name!r}: {meant!r}}} leads to no layer or parameter. {self.hint(meant)}")
            self._given[name] = target
        self._words: dict[str, list[Layer]] = {}
        for layer in sim.graph:
            for word in _words(layer):
                self._words.setdefault(word, []).append(layer)

    def of_tensor(self, name: str) -> Target | None:
        """What the tensor of that name is, None where that is not certain."""
        return self._given.get(name) or self._own_name(name) or self._scoped(name) or self._counted(name)

    def of_module(self, entry: Entry) -> Target | None:
        """What the side of a module is: its output, or the layer whose output it takes."""
        assert entry.side is not None
        side, position = entry.side
        if entry.label in self._given:
            return self._given[entry.label]
        if entry.name not in self._graph:
            return None
        layer = self._graph[entry.name]
        if side == "output":
            return Target(layer.name, "output") if position == 0 else None
        sources = [source for source in layer.inputs if source.is_float]
        return Target(sources[position].name, "output") if position < len(sources) else None

    def hint(self, name: str) -> str:
        """The nearest names."""
        return nearest(name, [*(layer.name for layer in self._graph), *self._parameters])

    def _own_name(self, name: str) -> Target | None:
        if name in self._graph:
            return Target(name, "output")
        return self._parameters.get(name)

    def _scoped(self, name: str) -> Target | None:
        """'/layer1/layer1.0/conv1/Conv_output_0' is 'layer1.0.conv1', '/layer1/layer1.0/Add_output_0' its first add."""
        match_ = re.fullmatch(r"((?:/[^/]+)*)/([A-Za-z]+)(?:_(\d+))?_output_0", name)
        if match_ is None:
            return None
        path = ""
        for part in match_[1].split("/")[1:]:
            last = path.rpartition(".")[2]
            path = path.removesuffix(last) + part if last and part.startswith(f"{last}.") else f"{path}.{part}"
            path = path.lstrip(".")
        if path in self._graph and self._graph[path].module is not None:
            return Target(path, "output")
        kinds, count = kinds_of(match_[2]), int(match_[3] or 0)
        inside = [s for s in self._graph if s.function is not None and _scope(s) == path and s.kind in kinds]
        return Target(inside[count].name, "output") if count < len(inside) else None

    def _counted(self, name: str) -> Target | None:
        match_ = re.fullmatch(r"([a-z]\w*?)(?:_(\d+))?", name)
        if match_ is None:
            return None
        layers, count = self._words.get(match_[1].replace("_", ""), []), int(match_[2] or 0)
        return Target(layers[count].name, "output") if count < len(layers) else None


def _parameters(sim: QuantSim) -> dict[str, Target]:
    """What each name of a quantized weight, and of the biases beside them, stands for."""
    found: dict[str, Target] = {}
    names = ParameterNames(sim.model)
    for layer in sim.graph:
        quantizer = sim.placed[layer.name].weight
        if quantizer is None:
            continue
        for alias in names.aliases(names.weight(quantizer)):
            found.setdefault(alias, Target(layer.name, "weight"))
        if layer.module is not None:
            found.setdefault(bias_name(layer), Target(layer.name, "bias"))
    return found


def _scope(layer: Layer) -> str:
    """The path of the module whose code called the function."""
    return layer.name.rpartition(".")[0]


def _words(layer: Layer) -> set[str]:
    """How the dynamo exporter may call the layer's value, without underscores."""
    word = (type(layer.module).__name__.lower() if layer.module is not None else layer.function_name).replace("_", "")
    found = {word, word.removeprefix("adaptive")} - {""}
    return found | {"view", "reshape"} if layer.kind == "reshape" else found


def _place_between(sim: QuantSim, entries: Iterable[Entry], targets: dict[str, Target]) -> None:
    """Changes `targets`: made-up names between two known ones take the layers between those two, if as many."""
    run: list[Entry] = []
    before = -1
    for entry in (*(e for e in entries if e.bits != 32), None):
        target = targets.get(entry.label) if entry is not None else None
        if entry is not None and target is None:
            run.append(entry)
            continue
        if target is not None and target.part != "output":
            continue
        after = len(sim.graph) if target is None else sim.graph[target.layer].index
        free = [layer for layer in _free(sim, targets) if before < layer.index < after]
        if run and len(free) == len(run) and all(_MADE_UP.fullmatch(e.name) for e in run):
            targets.update({e.label: Target(layer.name, "output") for e, layer in zip(run, free, strict=True)})
        run, before = [], after


def _place_last(sim: QuantSim, entries: Iterable[Entry], targets: dict[str, Target]) -> None:
    """Changes `targets`: the only made-up name left takes the only layer left."""
    left = [e for e in entries if e.label not in targets and e.bits != 32]
    free = _free(sim, targets)
    if len(left) == len(free) == 1 and _MADE_UP.fullmatch(left[0].name):
        targets[left[0].label] = Target(free[0].name, "output")


def _free(sim: QuantSim, targets: Mapping[str, Target]) -> list[Layer]:
    """The layers with a quantizer of their own that no entry is known to mean."""
    taken = {target.layer for target in targets.values() if target.part == "output"}
    return [
        entry.layer for entry in sim.placed.values() if entry.role is Role.QUANTIZED and entry.layer.name not in taken
    ]
