"""Placement: which tensors are quantized, and where a tensor lies on another's grid or stays float, with the reason.

Every layer gets a role; none is left out. Roles are found in one pass over the layers by the rules of a preset.
"""

import enum
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

from qlab.errors import UnknownLayer, nearest
from qlab.graph import KNOWN_RANGES, SAME_GRID, Layer, LayerGraph
from qlab.quantization import PER_TENSOR, Quantizer, QuantSpec, WeightQuantizer
from qlab.sim.presets import Preset

RECURRENT = ("lstm", "gru", "rnn")


class Role(enum.Enum):
    """What happens to the output of a layer."""

    QUANTIZED = "quantized"  # by its own quantizer
    FUSED = "fused"  # computed as one with the layers that follow; their output is quantized
    INHERITS = "inherits"  # its values lie on the grid of an input
    FLOAT = "float"


@dataclass
class Placed:
    """The role of one layer: its quantizers and why.

    output: the quantizer of the tensor, own, of the fused group or of the input it inherits from; None where float.
    weight: the quantizer of the layer's weight.
    """

    layer: Layer
    role: Role
    reason: str
    output: Quantizer | None = None
    weight: WeightQuantizer | None = None
    carries_weight: bool = False  # a parameter layer whose value is a quantized weight


def place(graph: LayerGraph, preset: Preset) -> dict[str, Placed]:
    """The role of every layer under the rules of `preset`. Raises UnknownLayer for a skip that matches nothing."""
    skipped = _skipped(graph, preset)
    placed = {
        layer.name: Placed(layer, Role.FLOAT, reason) if (reason := _float_reason(layer)) else None for layer in graph
    }
    weights = _place_weights(graph, preset, skipped, placed)
    followers = _fused(graph, preset, skipped)
    for layer in graph:
        if placed[layer.name] is None:
            placed[layer.name] = _place_output(layer, preset, skipped, placed, followers)  # type: ignore[arg-type]
    for layer in reversed(graph.layers):  # a fused layer is governed by the quantizer of its group
        entry = placed[layer.name]
        if entry is not None and layer.name in followers:
            entry.output = placed[followers[layer.name].name].output  # type: ignore[union-attr]
    for name, quantizer in weights.items():
        placed[name].weight = quantizer  # type: ignore[union-attr]
    result: dict[str, Placed] = {name: entry for name, entry in placed.items() if entry is not None}
    if preset.share_cat:
        _share_cat(graph, result)
    return result


def _skipped(graph: LayerGraph, preset: Preset) -> set[str]:
    found: set[str] = set()
    for pattern in preset.skip:
        matches = {layer.name for layer in graph if matches_glob(layer.name, pattern)}
        if not matches:
            names = [layer.name for layer in graph]
            raise UnknownLayer(f"skip={pattern!r} matches no layer. {nearest(pattern, names)}")
        found |= matches
    return found


def matches_glob(name: str, pattern: str) -> bool:
    """Whether a layer name matches a glob, case-sensitively; 'layer1' does not match 'layer1.0', 'layer1*' does.

    >>> matches_glob("layer1.0.conv", "layer1.*")
    True
    """
    return fnmatchcase(name, pattern)


def _float_reason(layer: Layer) -> str:
    """Why a layer cannot be quantized at all, '' where it can."""
    if layer.kind in RECURRENT:
        return "a recurrent layer returns several tensors; its gates stay in float"
    if layer.dtype is None:
        return "" if layer.kind in SAME_GRID else "not a single tensor"
    if not layer.dtype.is_floating_point:
        return f"{str(layer.dtype).removeprefix('torch.')} values are not quantized"
    return ""


def _place_weights(
    graph: LayerGraph, preset: Preset, skipped: set[str], placed: dict[str, Placed | None]
) -> dict[str, WeightQuantizer]:
    """One quantizer a parameter, shared by all layers that use it as their weight."""
    quantizers: dict[int, WeightQuantizer] = {}
    result: dict[str, WeightQuantizer] = {}
    for layer in graph:
        source = layer.weight_source
        if source is None or layer.name in skipped:
            continue
        owner, attribute, axis = source
        parameter = getattr(owner, attribute)
        if not parameter.is_floating_point():
            continue
        spec = _spec(preset, layer.kind, "weight")
        if spec is None:
            continue
        if id(parameter) not in quantizers:
            quantizers[id(parameter)] = WeightQuantizer(spec, layer.name, owner, attribute, axis)
        result[layer.name] = quantizers[id(parameter)]
    for layer in graph:
        if layer.owner is None:
            continue
        value = getattr(layer.owner, layer.attribute)
        uses = [user for user in layer.users if user.name in result and result[user.name].weight is value]
        if uses and len(uses) == len(layer.users):
            entry = Placed(layer, Role.FUSED, f"the weight of {uses[0].name!r}", carries_weight=True)
            entry.weight = result[uses[0].name]
            placed[layer.name] = entry
        elif layer.users and all(_is_small_operand(layer, user) for user in layer.users):
            placed[layer.name] = Placed(layer, Role.FLOAT, "a bias or normalisation parameter, kept in float")
    return result


def _is_small_operand(parameter: Layer, user: Layer) -> bool:
    """Whether `parameter` is a bias or normalisation operand of `user`, which targets keep at higher precision."""
    norms = ("layer_norm", "batch_norm", "group_norm", "rms_norm", "instance_norm", "prelu")
    if user.kind in norms or user.kind in RECURRENT:
        return True
    if user.function_name == "addmm":
        return bool(user.args) and user.args[0] is parameter
    return user.kind in ("conv", "conv_transpose", "linear") and len(user.args) > 2 and user.args[2] is parameter


def _spec(preset: Preset, kind: str, part: str) -> QuantSpec | None:
    for name, which, spec in preset.kinds:
        if name == kind and which == part:
            return spec
    return preset.weight if part == "weight" else preset.output


def _fused(graph: LayerGraph, preset: Preset, skipped: set[str]) -> dict[str, Layer]:
    """The layer that follows each fused layer in its supergroup; longest matches first, no layer in two groups."""
    groups = sorted(preset.supergroups, key=len, reverse=True)
    followers: dict[str, Layer] = {}
    taken: set[str] = set()
    for layer in graph:
        if layer.name in taken:
            continue
        for group in groups:
            chain = _match(layer, group, graph, skipped | taken)
            if chain:
                taken.update(step.name for step in chain)
                followers.update({a.name: b for a, b in pairwise(chain)})
                break
    return followers


def _match(layer: Layer, group: tuple[str, ...], graph: LayerGraph, excluded: set[str]) -> list[Layer]:
    chain = [layer]
    for position, kind in enumerate(group):
        current = chain[-1]
        if current.kind != kind or current.name in excluded:
            return []
        if position == len(group) - 1:
            return chain
        following = [user for user in current.users if user.kind != "size"]
        if len(following) != 1 or any(o is current for o in graph.outputs):
            return []
        chain.append(following[0])
    return []


def _place_output(
    layer: Layer,
    preset: Preset,
    skipped: set[str],
    placed: dict[str, Placed],
    followers: dict[str, Layer],
) -> Placed:
    if layer.name in skipped:
        return Placed(layer, Role.FLOAT, "skipped by the preset")
    if layer.name in followers:
        return Placed(layer, Role.FUSED, f"one with {followers[layer.name].name!r}")
    if layer.kind == "input" and not preset.quantize_inputs:
        return Placed(layer, Role.FLOAT, "inputs stay in float")
    if _is_mask(layer):
        return Placed(layer, Role.FLOAT, "an attention mask, not a value")
    if layer.kind in SAME_GRID:
        return _inherit(layer, placed, preset)
    spec = _spec(preset, layer.kind, "output")
    if spec is None:
        return Placed(layer, Role.FLOAT, f"the preset keeps {layer.kind} in float")
    note = ""
    if layer.kind in KNOWN_RANGES:
        spec = replace(spec, known_range=KNOWN_RANGES[layer.kind], granularity=PER_TENSOR)
    if layer.kind == "attention":
        note = "scores inside the fused attention stay in float; qlab.prepare makes them layers"
    return Placed(layer, Role.QUANTIZED, note, Quantizer(spec, layer.name, layer.channel_axis))


def _inherit(layer: Layer, placed: dict[str, Placed], preset: Preset) -> Placed:
    sources = [source for source in layer.inputs if placed.get(source.name) is not None and _has_values(source)]
    source = sources[0] if sources else None
    if source is None:
        return Placed(layer, Role.FLOAT, "its values come from no quantized tensor")
    origin = placed[source.name]
    if origin.output is None:
        spec = _spec(preset, layer.kind, "output")
        if spec is not None and (layer.kind == "relu" or source.kind in RECURRENT) and layer.is_float:
            return Placed(layer, Role.QUANTIZED, "", Quantizer(spec, layer.name, layer.channel_axis))
        return Placed(layer, Role.FLOAT, f"passes on {source.name!r}, which is float")
    return Placed(layer, Role.INHERITS, f"on the grid of {origin.output.name!r}", origin.output)


def _has_values(layer: Layer) -> bool:
    return layer.kind in ("split", "max", "max_pool", *RECURRENT) or layer.is_float


def _is_mask(layer: Layer) -> bool:
    """A float constant of zeros and hugely negative numbers, or a tensor made from a boolean: a mask."""
    if layer.owner is not None:
        value = getattr(layer.owner, layer.attribute)
        return value.is_floating_point() and value.numel() > 0 and bool((value.min() <= -1e30).item())
    if layer.kind in ("mask", "cast", "full", "full_like", "triu", "tril"):
        return not any(source.is_float or source.kind == "split" for source in layer.inputs)
    return False


def _share_cat(graph: LayerGraph, placed: dict[str, Placed]) -> None:
    """Changes `placed`: inputs of a concatenation take one quantizer and the concatenation inherits it.

    Where an input's range is known, or is float, the concatenation keeps a quantizer of its own.
    """
    for layer in graph:
        if layer.kind != "cat" or placed[layer.name].role is not Role.QUANTIZED:
            continue
        own = placed[layer.name].output
        sources = [placed[source.name].output for source in layer.inputs if source.is_float]
        if own is None or any(q is None or q.spec.known_range is not None for q in sources):
            continue
        if any(placed[source.name].layer.kind == "input" for source in layer.inputs):
            continue
        shared = sources[0]
        assert shared is not None
        merged = {id(q) for q in sources} | {id(own)}
        for entry in placed.values():
            if entry.output is not None and id(entry.output) in merged:
                entry.output = shared
        placed[layer.name].role = Role.INHERITS
        placed[layer.name].reason = f"its inputs share the grid of {shared.name!r}"
