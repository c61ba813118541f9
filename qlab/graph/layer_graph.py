"""The captured model as a list of layers: plain Python that runs, is edited in place and deep-copies.

A `Layer` is one named step: a call of one of the user's modules, or of a function, or an input, parameter or constant.
`LayerGraph.run` calls one layer after the other; who wants other behaviour (quantize, record, skip) passes another
`call`. Values are freed after their last use.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.errors import InputError, UnknownLayer, nearest
from qlab.graph.kinds import WEIGHTED, is_depthwise, kind_of

Call = Callable[["Layer", tuple[Any, ...], dict[str, Any]], Any]


# Function name to (position of the weight operand, its output channel axis).
WEIGHT_POSITION = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), (1, 0)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (1, 1)),
    **dict.fromkeys(("matmul", "mm", "bmm"), (1, -1)),
    "addmm": (2, 1),
    "embedding": (0, 0),
}


class Layer:
    """One step of the model.

    name: the user's module path, or path and function for a function ('layer1.0.add'); a second call of a module is
    'path@1'. args, kwargs: as called, with `Layer` objects where values of other layers go. location: 'file:line' of
    the user's code. shape: of the output on the example, None for a dynamic dimension; None where there is no tensor.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any] | None,
        module: nn.Module | None,
        path: str | None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        kind: str | None = None,
    ) -> None:
        self.name = name
        self.function = function
        self.module = module
        self.path = path
        self.args = args
        self.kwargs = kwargs or {}
        self.kind = kind or kind_of(module, function)
        self._inputs: tuple[Any, Any, list[Layer]] = None, None, []
        self.owner: nn.Module | None = None  # of a parameter layer: getattr(owner, attribute) is its value
        self.attribute = ""
        self.index = -1
        self.users: list[Layer] = []
        self.location = ""
        self.shape: tuple[int | None, ...] | None = None
        self.example_shape: tuple[int, ...] | None = None  # of an input layer: the sizes it was captured with
        self.dtype: torch.dtype | None = None
        self.constant: Any = None  # of an input layer that is no tensor: the value it was captured with

    @property
    def inputs(self) -> list["Layer"]:
        """The layers whose values this one takes, in order, each once."""
        args, kwargs, found = self._inputs
        if args is not self.args or kwargs is not self.kwargs:  # found once: a sweep asks a thousand times
            leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda v: isinstance(v, Layer))
            found = list({id(value): value for value in leaves if isinstance(value, Layer)}.values())
            self._inputs = self.args, self.kwargs, found
        return found

    @property
    def is_float(self) -> bool:
        """Whether the layer produces one floating-point tensor."""
        return self.dtype is not None and self.dtype.is_floating_point

    @property
    def channel_axis(self) -> int | None:
        """The axis of channels of the output: 1 for images and sequences of convolutions, the last one otherwise."""
        if self.shape is None or len(self.shape) < 2:
            return None
        axis = 1 if self.is_spatial else len(self.shape) - 1
        return axis if self.shape[axis] is not None else None

    @property
    def is_spatial(self) -> bool:
        """Whether the output has channels before positions, as convolutions produce."""
        if self.shape is None or len(self.shape) < 3:
            return False
        if self.kind in ("conv", "depthwise_conv", "conv_transpose", "batch_norm", "group_norm", "instance_norm"):
            return True
        return len(self.shape) in (4, 5) and not self.kind.startswith(("layer_norm", "linear", "attention", "matmul"))

    @property
    def parameters(self) -> int:
        """The number of parameters of the layer's own module."""
        return sum(p.numel() for p in self.module.parameters(recurse=False)) if self.module is not None else 0

    @property
    def weight_source(self) -> tuple[nn.Module, str, int] | None:
        """(owner, attribute, output channel axis) of the layer's weight, None where it has none.

        The weight of a module, or the parameter that a function takes as its weight operand.
        """
        if self.module is not None:
            weight = getattr(self.module, "weight", None)
            if self.kind not in WEIGHTED and self.kind != "depthwise_conv":
                return None
            transposed = self.kind == "conv_transpose" and not is_depthwise(self.module)
            return (self.module, "weight", int(transposed)) if isinstance(weight, Tensor) else None
        position = WEIGHT_POSITION.get(self.function_name)
        if position is None or len(self.args) <= position[0]:
            return None
        operand = self.args[position[0]]
        if not isinstance(operand, Layer) or operand.owner is None or len(operand.shape or ()) < 2:
            return None
        return operand.owner, operand.attribute, position[1] % len(operand.shape or ())

    @property
    def function_name(self) -> str:
        """The name of the function without namespace and overload, '' for modules and inputs."""
        return getattr(self.function, "__name__", str(self.function)).split(".")[0] if self.function else ""

    @property
    def title(self) -> str:
        """The kind as the user knows it: the module's class or the function's name."""
        if self.module is not None:
            return type(self.module).__name__
        return self.kind if self.function is None else getattr(self.function, "__name__", self.kind).split(".")[0]

    def __repr__(self) -> str:
        shape = "" if self.shape is None else " -> " + str([d if d is not None else "n" for d in self.shape])
        return f"Layer({self.name!r}, {self.title}, from {[layer.name for layer in self.inputs]}{shape})"


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """What a BatchNorm that was folded away knew of the values at its place: mean and standard deviation [C]."""

    mean: Tensor
    deviation: Tensor


class LayerGraph:
    """A model as layers in order of execution.

    root: the module that owns every parameter, under the user's names. in_spec, out_spec: how the user passes
    arguments and takes results. signature: the names of the model's positional parameters, of which the example gave
    the first `positional` by position and `keywords` by name. edits: structural changes since capture, as data (see
    `replace_module`). folded: what folded BatchNorms knew, by the name of the layer that stands in their place.
    left_out: classes among the model's results that hold no tensor for capture to see; None stands in their place.
    runs_whole: the layers can be run all together only (see ModuleGraph).
    """

    runs_whole = False

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[Layer],
        outputs: Sequence[Any],
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        signature: Sequence[str],
        positional: int,
        keywords: Sequence[str],
    ) -> None:
        self.root = root
        self.layers = list(layers)
        self.outputs = list(outputs)
        self.in_spec = in_spec
        self.out_spec = out_spec
        self.signature = list(signature)
        self.positional = positional
        self.keywords = list(keywords)
        self.edits: list[tuple[str, str]] = []
        self.folded: dict[str, FoldedNorm] = {}
        self.left_out: tuple[str, ...] = ()
        self.link()

    def link(self) -> None:
        """Changes the graph's own bookkeeping (indices, users, last uses) to fit `layers`; call after an edit."""
        self._by_name = {layer.name: layer for layer in self.layers}
        last: dict[int, int] = {}
        for index, layer in enumerate(self.layers):
            layer.index, layer.users = index, []
        for layer in self.layers:
            for source in layer.inputs:
                source.users.append(layer)
                last[source.index] = layer.index
        for output in self.outputs:
            if isinstance(output, Layer):
                last.pop(output.index, None)
        self._frees: list[list[int]] = [[] for _ in self.layers]
        for source_index, user_index in last.items():
            self._frees[user_index].append(source_index)
        self._plain = [_is_plain(layer) for layer in self.layers]

    @property
    def input_layers(self) -> list[Layer]:
        """The layers that stand for the model's inputs."""
        return [layer for layer in self.layers if layer.kind == "input"]

    def __getitem__(self, name: str) -> Layer:
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownLayer(f"the model has no layer {name!r}. {nearest(name, self._by_name)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerGraph":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        for spec in (self.in_spec, self.out_spec):  # immutable
            memo[id(spec)] = spec
        # Layers know their neighbours: copied one through the other they would go as deep as the model is long.
        new = [(layer, Layer.__new__(Layer)) for layer in self.layers if id(layer) not in memo]
        memo.update({id(layer): copied for layer, copied in new})
        for layer, copied in new:
            copied.__dict__.update(copy.deepcopy(layer.__dict__, memo))
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin

    # Execution --------------------------------------------------------------------------------------------------------

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The user's arguments as one flat list, one value an input layer; raises InputError where they do not fit."""
        given = dict(zip(self.signature, args, strict=False)) | kwargs
        try:
            if len(args) > len(self.signature):
                raise KeyError
            args = tuple(given.pop(name) for name in self.signature[: self.positional])
            kwargs = {name: given.pop(name) for name in self.keywords}
            flat, spec = pytree.tree_flatten((args, kwargs))
            if spec != self.in_spec or any(value is not None for value in given.values()):
                raise KeyError
        except KeyError:
            expected = ", ".join([*self.signature[: self.positional], *self.keywords])
            raise InputError(
                f"the model was captured with inputs ({expected}); it was called with {len(args)} positional and "
                f"{sorted(kwargs)} keyword arguments. Call it as in the example given to QuantSim."
            ) from None
        for layer, value in zip(self.input_layers, flat, strict=True):
            _check_input(layer, value)
        return flat

    def run(self, flat: Sequence[Any], call: Call | None = None) -> Any:
        """The model's result for the flat inputs, each layer computed by `call` (float as captured when None)."""
        call = call or call_layer
        values: list[Any] = [None] * len(self.layers)
        inputs = iter(flat)
        for layer, frees, plain in zip(self.layers, self._frees, self._plain, strict=True):
            index = layer.index
            if layer.kind == "input":
                values[index] = call(layer, (next(inputs),), {})
            elif plain:
                args = [values[a.index] if isinstance(a, Layer) else a for a in layer.args]
                values[index] = call(layer, tuple(args), layer.kwargs)
            else:
                values[index] = call(layer, fill(layer.args, values), fill(layer.kwargs, values))
            for free in frees:
                values[free] = None
        return self.result(values)

    def result(self, values: Sequence[Any]) -> Any:
        """The model's result in the user's structure, from the values of all layers."""
        outputs = [values[o.index] if isinstance(o, Layer) else o for o in self.outputs]
        return pytree.tree_unflatten(outputs, self.out_spec)

    # Edits ------------------------------------------------------------------------------------------------------------

    def replace_module(self, name: str, kind: str) -> None:
        """Changes the module of layer `name` to a parameter-free one: kind 'identity' or 'relu'.

        Used when BatchNorm was folded or ReLU6 is replaced. The edit is recorded, so that a saved sim can repeat it.
        """
        layer = self[name]
        module: nn.Module = {"identity": nn.Identity, "relu": nn.ReLU}[kind]()
        module.train(self.root.training)
        if layer.path is not None:
            parent, _, attribute = layer.path.rpartition(".")
            setattr(self.root.get_submodule(parent), attribute, module)
        for other in self.layers:
            if other is layer or (layer.path is not None and other.path == layer.path and other.module is not None):
                other.module, other.function, other.kind = module, None, kind
                other.args, other.kwargs = other.args[:1], {}
        self.edits.append((name, kind))
        self.link()

    def require_edges(self, purpose: str = "") -> None:
        """Raises NeedsCapture where it is not known which layer feeds which; says that `purpose` is off then."""

    def downstream(self, names: Sequence[str]) -> set[int]:
        """Indices of the named layers and of everything that depends on them."""
        dirty = {self[name].index for name in names}
        for layer in self.layers:
            if any(source.index in dirty for source in layer.inputs):
                dirty.add(layer.index)
        return dirty


def call_layer(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's value as captured, in float."""
    if layer.module is not None:
        return layer.module(*args, **kwargs)
    if layer.kind == "input":
        return args[0]
    if layer.kind == "parameter":
        return getattr(layer.owner, layer.attribute)
    assert layer.function is not None
    return layer.function(*args, **kwargs)


def fill(template: Any, values: Sequence[Any]) -> Any:
    """`template` with every Layer in its (nested) lists, tuples and dicts replaced by its value."""
    if isinstance(template, Layer):
        return values[template.index]
    if isinstance(template, (list, tuple)):
        return type(template)(fill(item, values) for item in template)
    if isinstance(template, dict):
        return {key: fill(item, values) for key, item in template.items()}
    return template


def _is_plain(layer: Layer) -> bool:
    nested = any(isinstance(a, (list, tuple, dict)) for a in layer.args) or any(
        isinstance(a, (Layer, list, tuple, dict)) for a in layer.kwargs.values()
    )
    return not nested


def _check_input(layer: Layer, value: Any) -> None:
    if layer.shape is None:
        if isinstance(value, Tensor) or type(value) is not type(layer.constant) or value != layer.constant:
            raise InputError(
                f"input {layer.name!r} was captured as {layer.constant!r} and stays so; got {value!r}. Capture the "
                "model once for each value, or make it a tensor."
            )
        return
    if not isinstance(value, Tensor):
        raise InputError(f"input {layer.name!r} must be a tensor; got {type(value).__name__}.")
    fits = len(value.shape) == len(layer.shape) and all(
        want is None or want == have for want, have in zip(layer.shape, value.shape, strict=True)
    )
    if not fits:
        wanted = [d if d is not None else "any" for d in layer.shape]
        axes = tuple(i for i, (w, h) in enumerate(zip(layer.shape, value.shape, strict=False)) if w not in (None, h))
        advice = f" To allow other sizes, capture with dynamic={axes}." if len(value.shape) == len(layer.shape) else ""
        raise InputError(
            f"input {layer.name!r} must have shape {wanted}; got {list(value.shape)}. The model was captured with the "
            f"example's sizes; only the batch size may differ.{advice}"
        )
