"""A sim as bytes, to be used in another process: what pickle cannot carry goes by name or is rebuilt.

Layers go one after the other, not one through the other, for models are deep. ATen operators go by name. Modules whose
class another process cannot import (classes of a notebook) become plain containers with the same children, parameters
and names: the captured graph never calls them. Bytes are for processes of one's own and are never read from a file;
`sim.save` is the file format.
"""

import io
import pickle
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from qlab.errors import InputError
from qlab.graph import Layer, LayerGraph
from qlab.graph.admission import register_results

try:  # carries functions and classes of a notebook; comes with qlab[dask]
    from cloudpickle import Pickler as _BasePickler
except ImportError:
    _BasePickler = pickle.Pickler


class Container(nn.Module):
    """Holds parameters and children under the user's names, in place of a class that only the notebook knows."""


def to_bytes(value: Any) -> bytes:
    """`value`, which may hold sims, as bytes for `from_bytes`; raises InputError where some part cannot travel."""
    stream = io.BytesIO()
    try:
        _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError(
            f"this cannot be sent to another process: {error}. Define functions and classes at the top level of a "
            "module that the workers can import, or install cloudpickle."
        ) from error
    return stream.getvalue()


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` wrote in a process of one's own."""
    return pickle.loads(data)


class _Pickler(_BasePickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_graphs: set[int] = set()  # ids of the layers whose state goes with their graph

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, LayerGraph):
            self._in_graphs.update(map(id, value.layers))
            states = [layer.__dict__ for layer in value.layers]
            return _graph, (type(value), value.layers, states), value.__dict__
        if isinstance(value, Layer) and id(value) in self._in_graphs:
            return _empty, (Layer,)
        if isinstance(value, OpOverload):
            return _operator, (value.namespace, value._opname, value._overloadname)
        if isinstance(value, pytree.TreeSpec):
            return _tree_spec, (pytree.tree_unflatten([torch.zeros(())] * value.num_leaves, value),)
        if isinstance(value, nn.Module):
            if _is_importable(type(value)):
                state = value.__getstate__() if hasattr(value, "__getstate__") else value.__dict__
                return _empty, (type(value),), state
            plain = Container()
            kept = {name: value.__dict__[name] for name in plain.__dict__ if "hook" not in name}
            return _empty, (Container,), plain.__dict__ | kept
        inherited = getattr(super(), "reducer_override", None)
        return NotImplemented if inherited is None else inherited(value)


def _is_importable(kind: type) -> bool:
    return kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__


def _empty(kind: Any) -> Any:
    return kind.__new__(kind)


def _graph(kind: type[LayerGraph], layers: list[Layer], states: list[dict[str, Any]]) -> LayerGraph:
    for layer, state in zip(layers, states, strict=True):
        layer.__dict__.update(state)
    return kind.__new__(kind)


def _operator(namespace: str, name: str, overload: str) -> OpOverload:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _tree_spec(structure: Any) -> pytree.TreeSpec:
    register_results(structure)
    return pytree.tree_structure(structure)
