"""`qlab.prepare`: the captured model as an ordinary module in which every step has a name.

What was written as functions in forward becomes modules under the names that a sim gives the steps; a module that is
called twice becomes two that share their weights. The result is a torch.fx.GraphModule: it runs, trains, deep-copies,
saves and can be captured again.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.node import map_aggregate

from qlab.errors import InputError
from qlab.graph.capture import capture
from qlab.graph.layer_graph import Layer, LayerGraph
from qlab.graph.step import Step

DECOMPOSABLE = ("silu", "hardswish", "attention")
"""Kinds that `prepare` can write as the layers that a target computes them by."""


def prepare(model: nn.Module, example: Any, decompose: Collection[str] = (), dynamic: Sequence[int] = ()) -> nn.Module:
    """A copy of `model` in which every step is a named module; `model` is not changed.

    Its result equals the model's bit for bit. decompose: kinds to write as smaller layers, of 'silu' (x * sigmoid(x)),
    'hardswish' (x * hardsigmoid(x)) and 'attention' (scores, softmax, product); their results are equal up to float32
    rounding. Parameters keep their names. Dropout and BatchNorm are live: train() works, and dropout that was called as
    a function is a module. A module called several times becomes one for each call: they share weights, each has its
    own running statistics. example, dynamic: as QuantSim takes them. Raises CaptureError where the model cannot be
    captured.
    """
    given = (decompose,) if isinstance(decompose, str) else tuple(decompose)
    if unknown := [kind for kind in given if kind not in DECOMPOSABLE]:
        raise InputError(f"decompose takes {', '.join(DECOMPOSABLE)}; got {unknown[0]!r}.")
    return _Preparation(capture(model, example, dynamic), given).prepared(type(model).__name__)


class Prepared(fx.GraphModule):
    """What `prepare` returns: prints as one line a step, with what the step takes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prepared":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of pytree, about its own specs
            return super().__deepcopy__(memo)

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        rows = []
        for node in self.graph.nodes:
            if node.op == "call_module":
                sources = ", ".join(n.name if n.op == "call_function" else str(n.target) for n in node.all_input_nodes)
                rows.append((str(node.target), f"from {sources}", repr(self.get_submodule(str(node.target)))))
        wide, deep = (min(max((len(row[column]) for row in rows), default=0), 48) for column in (0, 1))
        lines = [f"  {name:{wide}}  {sources:{deep}}  {told}" for name, sources, told in rows]
        return "\n".join([f"{self._get_name()}, prepared: {len(rows)} steps, each a module", *lines])


class _Preparation:
    """Writes a LayerGraph as an fx graph, step by step."""

    def __init__(self, graph: LayerGraph, decompose: Collection[str]) -> None:
        self._layers, self._decompose = graph, decompose
        self._graph = fx.Graph()
        self._parts: dict[str, Any] = {}  # path to module, parameter or buffer
        self._taken = {name for name, _ in graph.root.named_modules()} | {layer.name for layer in graph}
        self._nodes: dict[int, fx.Node] = {}
        self._locations: dict[str, str] = {}

    def prepared(self, name: str) -> Prepared:
        """The whole as a module of class `name`."""
        for layer in self._layers:
            self._nodes[layer.index] = self._written(layer)
        self._graph.output(tuple(map_aggregate(self._layers.outputs, self._node_of)))
        arguments = [*self._layers.signature[: self._layers.positional], *self._layers.keywords]
        self._graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(arguments, self._layers.in_spec, self._layers.out_spec)))
        module = Prepared(self._parts, self._graph, name)
        module.meta["locations"] = self._locations
        return module.train(self._layers.root.training)

    def _written(self, layer: Layer) -> fx.Node:
        if layer.kind == "input":
            return self._graph.placeholder(layer.name.replace(".", "_"))
        if layer.owner is not None:
            path = str(layer.path)
            self._parts[path] = getattr(layer.owner, layer.attribute)
            return self._graph.get_attr(path)
        if layer.kind in self._decompose:
            return getattr(self, f"_{layer.kind}")(layer)
        if layer.module is not None:
            return self._module(layer)
        if not _is_step(layer):
            args, kwargs = (map_aggregate(tree, self._node_of) for tree in (layer.args, layer.kwargs))
            return self._graph.call_function(layer.function, args, kwargs)
        module = _as_module(layer)
        sources = layer.inputs if isinstance(module, Step) else layer.inputs[:1]
        return self._call(layer.name, module, [self._nodes[s.index] for s in sources], layer)

    def _module(self, layer: Layer) -> fx.Node:
        """A call of the user's module: its own at first, one that shares its weights at every further call."""
        module, path = layer.module, str(layer.path)
        assert module is not None
        if any(module is part for part in self._parts.values()):
            module, path = _split(module), self._free(path)
        args, kwargs = (map_aggregate(tree, self._node_of) for tree in (layer.args, layer.kwargs))
        self._parts[path] = module
        self._locations[path] = layer.location
        return self._graph.call_module(path, args, kwargs)

    def _call(self, path: str, module: nn.Module, sources: Sequence[fx.Node], layer: Layer) -> fx.Node:
        self._parts[path] = module
        self._locations[path] = layer.location
        return self._graph.call_module(path, tuple(sources))

    def _node_of(self, value: Any) -> Any:
        return self._nodes[value.index] if isinstance(value, Layer) else value

    def _free(self, path: str) -> str:
        number = 1
        while f"{path}_{number}" in self._taken:
            number += 1
        self._taken.add(f"{path}_{number}")
        return f"{path}_{number}"

    # Kinds written as smaller layers ----------------------------------------------------------------------------------

    def _silu(self, layer: Layer) -> fx.Node:
        return self._gated(layer, "sigmoid", nn.Sigmoid())

    def _hardswish(self, layer: Layer) -> fx.Node:
        return self._gated(layer, "hardsigmoid", nn.Hardsigmoid())

    def _gated(self, layer: Layer, name: str, gate: nn.Module) -> fx.Node:
        """x * gate(x)."""
        path = self._path_of(layer)
        x = self._nodes[layer.inputs[0].index]
        opened = self._call(f"{path}.{name}", gate, [x], layer)
        return self._step(f"{path}.mul", torch.ops.aten.mul.Tensor, [x, opened], layer)

    def _attention(self, layer: Layer) -> fx.Node:
        """softmax(q k^T * scale + mask) v, as torch.nn.functional.scaled_dot_product_attention documents it."""
        aten, path = torch.ops.aten, self._path_of(layer)
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), layer.args, strict=False))
        given |= layer.kwargs
        q, k, v = (given[name] for name in ("query", "key", "value"))
        sizes = [source.shape for source in (q, k)]
        if given.get("enable_gqa") or q.shape is None or q.shape[-1] is None:
            return self._whole(layer)
        nodes = [self._nodes[source.index] for source in (q, k, v)]
        scale = given.get("scale") or q.shape[-1] ** -0.5
        scaled = self._step(f"{path}.scale", aten.mul.Tensor, [nodes[0]], layer, (scale,))
        keys = self._step(f"{path}.transpose", aten.transpose.int, [nodes[1]], layer, (-2, -1))
        scores = self._step(f"{path}.scores", aten.matmul.default, [scaled, keys], layer)
        mask = given.get("attn_mask")
        lowest = torch.finfo(q.dtype).min  # not -inf: a row without any place to look at would become NaN
        if given.get("is_causal"):
            rows, columns = (size[-2] for size in sizes)
            if rows is None or columns is None:
                return self._whole(layer)
            hidden = torch.full((rows, columns), lowest, dtype=q.dtype).triu(1)
            self._parts[f"{path}.causal"] = hidden
            scores = self._step(f"{path}.add", aten.add.Tensor, [scores, self._graph.get_attr(f"{path}.causal")], layer)
        elif mask is not None and mask.dtype is torch.bool:
            hidden_node = self._step(f"{path}.logical_not", aten.logical_not.default, [self._nodes[mask.index]], layer)
            filling = [scores, hidden_node]
            scores = self._step(f"{path}.masked_fill", aten.masked_fill.Scalar, filling, layer, (lowest,))
        elif mask is not None:
            scores = self._step(f"{path}.add", aten.add.Tensor, [scores, self._nodes[mask.index]], layer)
        shares = self._call(f"{path}.softmax", nn.Softmax(-1), [scores], layer)
        return self._step(f"{path}.matmul", aten.matmul.default, [shares, nodes[2]], layer)

    def _whole(self, layer: Layer) -> fx.Node:
        return self._call(layer.name, Step.of(layer), [self._nodes[s.index] for s in layer.inputs], layer)

    def _path_of(self, layer: Layer) -> str:
        """Where the smaller layers go: the layer's own path, or a free one like it where it is taken."""
        path = layer.name if layer.path is None else str(layer.path)
        taken = any(part == path or part.startswith(f"{path}.") for part in self._parts)
        return self._free(path) if taken else path

    def _step(
        self, path: str, function: Any, sources: Sequence[fx.Node], layer: Layer, constants: tuple[Any, ...] = ()
    ) -> fx.Node:
        stand_ins = tuple(Layer(str(number), None, None, None, kind="input") for number in range(len(sources)))
        module = Step.of(Layer(path, function, None, None, (*stand_ins, *constants)))
        return self._call(path, module, sources, layer)


def _is_step(layer: Layer) -> bool:
    """Whether the function computes with tensors: arithmetic on sizes and the parts of a tuple stay in the code."""
    tensors = layer.dtype is not None or any(source.dtype is not None for source in layer.inputs)
    return tensors and layer.kind not in ("size", "getitem")


def _split(module: nn.Module) -> nn.Module:
    """A module with the same parameters, and copies of the buffers."""
    shared = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, dict(shared))


def _as_module(layer: Layer) -> nn.Module:
    """The torch.nn module that computes what the layer's function does; a Step where there is none."""
    build = _MODULES.get(layer.function_name)
    constants = (*layer.args[1:], *layer.kwargs.values())
    if build is None or any(isinstance(value, (Layer, Tensor)) for value in constants):
        return Step.of(layer)
    module = build(*layer.args[1:], **layer.kwargs)
    return Step.of(layer) if module is None else module


def _plain(kind: type[nn.Module]) -> Callable[..., nn.Module | None]:
    return lambda *args, **kwargs: None if args or kwargs else kind()


# Name of the function to what makes a module of its constants; None where these are not the module's.
_MODULES: dict[str, Callable[..., nn.Module | None]] = {
    "relu": _plain(nn.ReLU),
    "silu": _plain(nn.SiLU),
    "mish": _plain(nn.Mish),
    "sigmoid": _plain(nn.Sigmoid),
    "tanh": _plain(nn.Tanh),
    "hardswish": _plain(nn.Hardswish),
    "hardsigmoid": _plain(nn.Hardsigmoid),
    "gelu": lambda approximate="none": nn.GELU(approximate),
    "leaky_relu": lambda negative_slope=0.01: nn.LeakyReLU(negative_slope),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: nn.Hardtanh(min_val, max_val),
    "softmax": lambda dim, dtype=None: nn.Softmax(dim) if dtype is None else None,
    "dropout": lambda p, train: None if train else nn.Dropout(p),
}
