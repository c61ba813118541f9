"""Weights that the code slices or transposes before it uses them: `x @ self.weight.T`, q, k and v cut from one matrix.

They are weights as much as those handed over whole; the parameter they come from is what gets the grid.
"""

from qlab.graph.layer_graph import WEIGHT_POSITION, Layer

_CUTS = frozenset({"split", "split_with_sizes", "chunk", "getitem", "slice", "clone", "contiguous", "detach", "alias"})
_VIEWS = _CUTS | {"t", "numpy_T", "mT", "transpose", "permute"}


def viewed_weight(layer: Layer) -> tuple[Layer, int] | None:
    """(parameter layer, its axis of output channels) behind the weight operand of `layer`.

    None where the layer takes its weight directly (see Layer.weight_source), or where more than slices and transposes
    lies between.
    """
    position = WEIGHT_POSITION.get(layer.function_name)
    if position is None or layer.weight_source is not None or len(layer.args) <= position[0]:
        return None
    current = layer.args[position[0]]
    if not isinstance(current, Layer):
        return None
    axis = position[1]
    while current.owner is None:
        rank = len(current.shape or ()) or _rank_of_split(current)
        step = _before(current, axis % rank, rank) if rank else None
        if step is None:
            return None
        current, axis = step
    rank = len(current.shape or ())
    return (current, axis % rank) if current.is_float and rank >= 2 else None


def views_of(parameter: Layer) -> tuple[list[Layer], list[tuple[Layer, Layer]]]:
    """(the slices and transposes of `parameter`, every (operand, user) pair in which it or one of them is used)."""
    views: list[Layer] = []
    uses: list[tuple[Layer, Layer]] = []
    for shown in (waiting := [parameter]):
        for user in shown.users:
            if user.function_name in _VIEWS:
                views.append(user)
                waiting.append(user)
            else:
                uses.append((shown, user))
    return views, uses


def _before(layer: Layer, axis: int, rank: int) -> tuple[Layer, int] | None:
    """The layer that `layer` shows a view of, and where `axis` lies in it."""
    source = layer.args[0] if layer.args else None
    if not isinstance(source, Layer):
        return None
    name = layer.function_name
    if name in ("t", "numpy_T", "mT") and rank == 2:
        return source, 1 - axis
    if name == "transpose":
        a, b = (value % rank for value in layer.args[1:3])
        return source, {a: b, b: a}.get(axis, axis)
    if name == "permute":
        return source, layer.args[1][axis] % rank
    return (source, axis) if name in _CUTS else None


def _rank_of_split(layer: Layer) -> int:
    """The rank of the tensors that a split returns: that of the tensor it cuts."""
    source = layer.args[0] if layer.kind == "split" and layer.args else None
    return len(source.shape or ()) if isinstance(source, Layer) else 0
