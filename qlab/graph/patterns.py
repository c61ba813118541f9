"""Patterns: places where a factor a channel passes from one layer to the next.

BatchNorm folding, cross-layer equalization and bias correction all ask which layer takes the channels of another one,
and whether everything between lets a positive factor through. `follow` and `links` answer that.
"""

from collections import Counter
from dataclasses import dataclass
from math import inf, prod

from torch import nn

from qlab.graph.kernel import Kernel, kernel_of
from qlab.graph.layer_graph import Layer, LayerGraph

HOMOGENEOUS = frozenset({"relu", "prelu", "leaky_relu", "identity", "dropout"})
"""Kinds with f(s x) = s f(x) for every positive s, element by element."""

_POOLING = frozenset({"max_pool", "avg_pool", "upsample_nearest", "interpolate", "zero_pad"})  # channels stay on axis 1
_ROW_MAJOR = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"})


class Uses:
    """How many layers of a graph use each parameter, and who takes each layer's value."""

    def __init__(self, graph: LayerGraph) -> None:
        graph.require_edges()
        self._results = {id(output) for output in graph.outputs}
        self._parameters: Counter[int] = Counter()
        for layer in graph:
            if layer.module is not None:
                self._parameters.update(id(p) for p in layer.module._parameters.values() if p is not None)
            for source in layer.inputs:
                if source.owner is not None:
                    self._parameters[id(getattr(source.owner, source.attribute))] += 1

    def sharing(self, kernel: Kernel) -> str:
        """Why the kernel's weight and bias cannot change for its own sake; '' where nothing else uses them."""
        for part, parameter in (("weight", kernel.weight), ("bias", kernel.bias)):
            if parameter is not None and self._parameters[id(parameter)] > 1:
                return f"the {part} of {kernel.name!r} is used {self._parameters[id(parameter)]} times"
        return ""

    def only_user(self, layer: Layer) -> Layer | str:
        """The one layer that takes the layer's value, or why there is no such one."""
        if id(layer) in self._results:
            return f"{layer.name!r} is a result of the model"
        users = [user for user in layer.users if user.kind != "size"]
        if len(users) != 1:
            return f"{len(users) or 'no'} layers take {layer.name!r}"
        return users[0]


@dataclass(frozen=True)
class Path:
    """The way to the kernel that takes a layer's channels, through layers that let a positive factor a channel pass.

    second: the kernel reached. repeat: channel c is its inputs from c * repeat on, more than one where a flatten stands
    between. between: the layers passed, in order. clipped: those among them that cut at an upper bound (ReLU6): factors
    pass them only when they are replaced by ReLU.
    """

    second: Kernel
    repeat: int
    between: tuple[Layer, ...]
    clipped: tuple[Layer, ...]


@dataclass(frozen=True)
class Link(Path):
    """Two kernels: a channel may be divided by any positive factor in one and multiplied by it in the other."""

    first: Kernel


def links(graph: LayerGraph) -> tuple[list[Link], dict[str, str]]:
    """Every link in order of execution, and for each kernel without one what stands in the way."""
    uses, found, reasons = Uses(graph), [], {}
    for layer in graph:
        first = kernel_of(layer)
        if first is None:
            continue
        path = uses.sharing(first) or follow(uses, layer, first.channel_axis)
        if isinstance(path, Path):
            found.append(Link(path.second, path.repeat, path.between, path.clipped, first))
        else:
            reasons[first.name] = path
    return found, reasons


def follow(uses: Uses, start: Layer, axis: int) -> Path | str:
    """The path from `start`, whose channels lie on `axis`, to the kernel that takes them; or what stands in the way."""
    current, repeat = start, 1
    between: list[Layer] = []
    clipped: list[Layer] = []
    while True:
        user = uses.only_user(current)
        if isinstance(user, str):
            return user
        second = kernel_of(user)
        if second is not None:
            fits = second.source is current and takes(second, current, axis, repeat)
            reason = uses.sharing(second) if fits else f"{second.name!r} takes other channels"
            return reason or Path(second, repeat, tuple(between), tuple(clipped))
        passed = passes(user, current, axis, repeat)
        if passed is None:
            return f"{user.name!r} ({user.title}) follows"
        axis, repeat = passed
        if user.kind in ("clip", "relu6") and upper_bound(user) != inf:
            clipped.append(user)
        between.append(user)
        current = user


def runs(found: list[Link]) -> list[list[Link]]:
    """Links joined through depthwise kernels, whose one range a channel both sides share: at least one link each."""
    following = {link.first.name: link for link in found}
    led_to = {link.second.name for link in found}
    joined = []
    for link in found:
        if link.first.is_depthwise and link.first.name in led_to:
            continue
        run = [link]
        while run[-1].second.is_depthwise and run[-1].second.name in following:
            run.append(following[run[-1].second.name])
        joined.append(run)
    return joined


def upper_bound(layer: Layer) -> float | None:
    """Where a layer that clips at 0 from below clips from above (inf: nowhere); None where it clips otherwise."""
    if layer.module is not None:
        low, high = getattr(layer.module, "min_val", None), getattr(layer.module, "max_val", None)
    elif layer.function_name == "relu6":
        low, high = 0.0, 6.0
    else:
        given = [*layer.args[1:], None, None]
        low, high = {
            "hardtanh": (given[0] if given[0] is not None else -1.0, given[1] if given[1] is not None else 1.0),
            "clamp": (layer.kwargs.get("min", given[0]), layer.kwargs.get("max", given[1])),
            "clamp_min": (given[0], None),
        }.get(layer.function_name, (None, None))
    high = inf if high is None else high
    plain = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return float(high) if plain and low == 0 and high > 0 else None


def passes(layer: Layer, source: Layer, axis: int, repeat: int) -> tuple[int, int] | None:
    """(axis, inputs a channel) after `layer`, None where a factor a channel does not pass it."""
    before, after = source.shape, layer.shape
    if before is None or after is None or not layer.args or layer.args[0] is not source:
        return None
    if layer.kind in HOMOGENEOUS:
        return axis, repeat
    if layer.kind in ("clip", "relu6"):
        return (axis, repeat) if upper_bound(layer) is not None else None
    if layer.kind in _POOLING:
        spatial = axis == 1 and repeat == 1 and len(before) > 2 and before[:2] == after[:2]
        return (axis, repeat) if spatial and _pads_with_nothing(layer) else None
    if layer.kind == "mean":
        return _after_mean(layer, axis, repeat, len(before))
    if layer.kind == "transpose":
        return _after_transpose(layer, axis, repeat, len(before))
    if layer.kind == "reshape" and (isinstance(layer.module, nn.Flatten) or layer.function_name in _ROW_MAJOR):
        return _after_reshape(before, after, axis, repeat)
    return None


def takes(kernel: Kernel, source: Layer, axis: int, repeat: int) -> bool:
    """Whether the kernel's input channels are those on `axis` of `source`, `repeat` of them a channel."""
    rank = len(source.shape or ())
    if kernel.form.windows is not None:
        return axis == 1 and repeat == 1 and rank == len(kernel.form.windows.kernel) + 2
    return axis == rank - 1


def _pads_with_nothing(layer: Layer) -> bool:
    """Whether padding, if the layer pads, is by zeros or by values of the input."""
    value = layer.args[3] if len(layer.args) > 3 and layer.function_name == "pad" else None
    if layer.function_name == "constant_pad_nd" and len(layer.args) > 2:
        value = layer.args[2]
    return layer.kind != "zero_pad" or value in (None, 0)


def _after_mean(layer: Layer, axis: int, repeat: int, rank: int) -> tuple[int, int] | None:
    axes = layer.args[1] if len(layer.args) > 1 else None
    if not isinstance(axes, (list, tuple)) or axis in (gone := [a % rank for a in axes]):
        return None
    keeps = layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("keepdim", False)
    return axis - (0 if keeps else sum(a < axis for a in gone)), repeat


def _after_transpose(layer: Layer, axis: int, repeat: int, rank: int) -> tuple[int, int] | None:
    if layer.function_name == "permute":
        return [a % rank for a in layer.args[1]].index(axis), repeat
    if layer.function_name == "transpose":
        a, b = (value % rank for value in layer.args[1:3])
        return {a: b, b: a}.get(axis, axis), repeat
    return None


def _after_reshape(
    before: tuple[int | None, ...], after: tuple[int | None, ...], axis: int, repeat: int
) -> tuple[int, int] | None:
    """A row-major reshape that leaves the axes up to the channels or from them on alone, or joins the latter to one."""
    rest = before[axis:]
    if None not in rest and after[-len(rest) :] == rest:
        return len(after) - len(rest), repeat
    free = [i for i, size in enumerate(before) if size is None]
    if free not in ([], [0]) or free != [i for i, size in enumerate(after) if size is None]:
        return None
    if prod(size or 1 for size in before) != prod(size or 1 for size in after):
        return None  # batches are split or joined
    if after[: axis + 1] == before[: axis + 1]:
        return axis, repeat
    if len(after) == axis + 1 and after[:axis] == before[:axis]:
        return axis, repeat * prod(size or 1 for size in before[axis + 1 :])
    return None
