"""Placement: which tensors are quantized, and where a tensor lies on another's grid or stays float, with the reason.

Every layer gets a role; none is left out. Roles are found in one pass over the layers by the rules of a preset.
"""

import enum
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn

from qlab.errors import UnknownLayer, nearest
from qlab.graph import KNOWN_RANGES, SAME_GRID, Layer, LayerGraph, Origin, Source, is_mask_value, origins
from qlab.graph.weight_views import viewed_weight, views_of
from qlab.quantization import PER_TENSOR, Quantizer, QuantSpec, WeightQuantizer
from qlab.sim.presets import Preset

RECURRENT = ("lstm", "gru", "rnn")

# Kinds of a graph that runs whole, see ModuleGraph.
_NOT_CAPTURED = {
    "code": "code between the modules, which could not be captured",
    "uncalled": "the example does not reach it: make the sim with one that does",
}


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
    known = origins(graph)
    for layer in graph:
        if placed[layer.name] is None:
            placed[layer.name] = (
                _before_activations(layer, known[layer.name])
                or _masked(layer, known, placed)
                or _place_output(layer, preset, skipped, placed, followers, known)
            )
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
    if layer.kind in _NOT_CAPTURED:
        return _NOT_CAPTURED[layer.kind]
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
        source = _weight_of(layer)
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
        views, uses = views_of(layer)
        weighted = [user for _, user in uses if user.name in result and result[user.name].weight is value]
        if weighted and len(weighted) == len(uses):
            role, reason = Role.FUSED, f"the weight of {weighted[0].name!r}"
            placed[layer.name] = Placed(layer, role, reason, weight=result[weighted[0].name], carries_weight=True)
        elif uses and all(_is_small_operand(operand, user) for operand, user in uses):
            role, reason = Role.FLOAT, "a bias or normalisation parameter, kept in float"
            placed[layer.name] = Placed(layer, role, reason)
        else:
            continue
        for view in views:
            placed[view.name] = Placed(view, role, f"part of {layer.name!r}, {reason}")
    return result


def _weight_of(layer: Layer) -> tuple[nn.Module, str, int] | None:
    """(owner, attribute, axis of output channels) of the layer's weight, whole or sliced or transposed."""
    if (viewed := viewed_weight(layer)) is None:
        return layer.weight_source
    parameter, axis = viewed
    assert parameter.owner is not None
    return parameter.owner, parameter.attribute, axis


def _is_small_operand(parameter: Layer, user: Layer) -> bool:
    """Whether `parameter` is a bias or normalisation operand of `user`, which targets keep at higher precision."""
    norms = ("layer_norm", "batch_norm", "group_norm", "rms_norm", "instance_norm", "prelu")
    if user.kind in norms:
        return True
    if user.function_name == "addmm":
        return bool(user.args) and user.args[0] is parameter
    return user.kind in ("conv", "conv_transpose", "linear") and len(user.args) > 2 and user.args[2] is parameter


def _spec(preset: Preset, kind: str, part: str) -> QuantSpec | None:
    for name, which, spec in preset.kinds:
        if name in (kind, "*") and which == part:
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
    placed: dict[str, Placed | None],
    followers: dict[str, Layer],
    known: dict[str, Origin],
) -> Placed:
    if layer.name in skipped:
        return Placed(layer, Role.FLOAT, "skipped by the preset")
    if layer.name in followers:
        return Placed(layer, Role.FUSED, f"one with {followers[layer.name].name!r}")
    if layer.kind == "input" and not preset.quantize_inputs:
        return Placed(layer, Role.FLOAT, "inputs stay in float")
    if not preset.quantize_outputs and not layer.users:
        return Placed(layer, Role.FLOAT, "outputs stay in float")
    if layer.kind in SAME_GRID and (inherited := _inherit(layer, placed, known)) is not None:
        return inherited
    spec = _spec(preset, layer.kind, "output")
    if spec is None:
        return Placed(layer, Role.FLOAT, f"the preset keeps {layer.kind} in float")
    note = ""
    if layer.kind in KNOWN_RANGES and spec.known_range is None:
        spec = replace(spec, known_range=KNOWN_RANGES[layer.kind], granularity=PER_TENSOR)
    if layer.kind == "attention":
        note = "scores inside the fused attention stay in float; qlab.prepare makes them layers"
    return Placed(layer, Role.QUANTIZED, note, Quantizer(spec, layer.name, layer.channel_axis))


def _before_activations(layer: Layer, origin: Origin) -> Placed | None:
    """FLOAT for masks and for what is computed from constants or integers before it meets an activation."""
    if origin.source is Source.ACTIVATION:
        return None
    if origin.mask:
        return Placed(layer, Role.FLOAT, "an attention mask, not a value")
    if origin.flag:
        return Placed(layer, Role.FLOAT, "made from booleans: 0 or 1 on any grid")
    if origin.folds:
        made = "constants" if origin.source is Source.CONSTANT else "integers"
        return Placed(layer, Role.FLOAT, f"computed from {made} alone, before any activation")
    if layer.users and all(user.kind in RECURRENT for user in layer.users):
        return Placed(layer, Role.FLOAT, "a state or parameter of a recurrent layer, which stays in float")
    return None


def _masked(layer: Layer, known: dict[str, Origin], placed: dict[str, Placed | None]) -> Placed | None:
    """The role of activations with a mask among them; softmax, which follows, has a grid again.

    An added mask leaves values as they are or hides them: they stay on their grid. Any other arithmetic would need a
    grid that holds both the values and the mask.
    """
    if not known[layer.name].mask or layer.kind in SAME_GRID:
        return None
    values = [source for source in layer.inputs if source.is_float and not _is_mask(source, known)]
    origin = placed[values[0].name] if len(values) == 1 else None
    if layer.kind == "add" and origin is not None and origin.output is not None:
        return Placed(
            layer, Role.INHERITS, f"adds a mask to values on the grid of {origin.output.name!r}", origin.output
        )
    return Placed(layer, Role.FLOAT, "values and a mask, which no grid holds together")


def _is_mask(layer: Layer, known: dict[str, Origin]) -> bool:
    """Whether the layer is a mask and nothing else."""
    return known[layer.name].mask and known[layer.name].source is not Source.ACTIVATION


def _inherit(layer: Layer, placed: dict[str, Placed | None], known: dict[str, Origin]) -> Placed | None:
    """The role of a layer that passes values on, None where it needs a grid of its own."""
    sources = [s for s in layer.inputs if placed[s.name] is not None and _has_values(s) and not _is_mask(s, known)]
    grids = {id(placed[source.name].output): source for source in sources}  # type: ignore[union-attr]
    others = [v for v in layer.args[1:] if isinstance(v, (int, float)) and v != 0 and not is_mask_value(v)]
    if len(grids) > 1 or (layer.function_name == "masked_fill" and others):
        return None  # values of several grids, or a number that the grid may not hold
    if not sources:
        return Placed(layer, Role.FLOAT, "its values come from no quantized tensor")
    source = sources[0]
    origin = placed[source.name]
    assert origin is not None
    if origin.output is None:
        needs_own = layer.kind == "relu" or source.kind in RECURRENT or known[source.name].folds
        if needs_own and layer.is_float:
            return None
        return Placed(layer, Role.FLOAT, f"passes on {source.name!r}, which is float")
    return Placed(layer, Role.INHERITS, f"on the grid of {origin.output.name!r}", origin.output)


def _has_values(layer: Layer) -> bool:
    return layer.kind in ("split", "max", "max_pool", *RECURRENT) or layer.is_float


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
