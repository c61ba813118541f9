"""A model that cannot be captured, as a graph that runs whole: its modules are layers, the code between them is not.

The model's own forward runs; each call of a module without children is handed to whoever runs the graph. So modules can
be quantized and measured, but no layer can be run on its own, and nothing is known of what lies between them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qlab.errors import CaptureError, InputError, NeedsCapture
from qlab.graph.admission import admitted, register_results, result_of, without_fused_attention
from qlab.graph.capture import capture
from qlab.graph.example import check_example, cloned, example_arguments, on_device_of, positional_parameters, tensors_of
from qlab.graph.layer_graph import Call, Layer, LayerGraph, call_layer

CODE = "code"
"""The kind of the layer that stands for everything between the modules."""

UNCALLED = "uncalled"
"""The kind of modules that the example does not reach."""


class _Calls(threading.local):
    """Who computes the modules of a graph, by the graph's id, in each thread that runs one."""

    def __init__(self) -> None:
        self.by_graph: dict[int, Call | None] = {}


_CALLS, _PATCHING = _Calls(), threading.Lock()


class ModuleGraph(LayerGraph):
    """Modules as layers, under the user's names; one layer a module, however often it is called.

    Where a module was seen to take another one's result unchanged on the example, it has it as its input; everything
    else comes from the layer 'forward', of kind `code`, and goes to the layer 'result'. reason: why capture failed.
    """

    runs_whole = True
    reason: str = ""
    _runs = 0  # going on now, in any thread

    def run(self, flat: Sequence[Any], call: Call | None = None) -> Any:
        """The model's result for the flat inputs, each module computed by `call`."""
        call = call or call_layer
        given = zip(self.input_layers, cloned(list(flat)), strict=True)
        values = [call(layer, (value,), {}) for layer, value in given]
        args, kwargs = pytree.tree_unflatten(values, self.in_spec)
        with self._handing_over_to(call), without_fused_attention():
            result = self.root(*args, **kwargs)
        return call(self.layers[-1], (result,), {})

    def result(self, values: Sequence[Any]) -> Any:
        """The model's result, from the values of all layers."""
        return values[self.layers[-1].index]

    def downstream(self, names: Sequence[str]) -> set[int]:
        """Every layer: what a change reaches is not known."""
        return {self[name].index for name in names} and set(range(len(self)))

    def require_edges(self, purpose: str = "") -> None:
        """Raises NeedsCapture: which layer feeds which is not known."""
        told = f"{purpose} is off for this sim: " if purpose else ""
        raise NeedsCapture(
            f"{told}which layer feeds which is not known, as the model could not be captured and runs module by "
            f"module. [{self.reason}]"
        )

    @contextlib.contextmanager
    def _handing_over_to(self, call: Call) -> Iterator[None]:
        """Within the context every call of a module that is a layer, by this thread, is computed by `call`."""
        before = _CALLS.by_graph.get(id(self))
        _CALLS.by_graph[id(self)] = call
        with _PATCHING:
            self._runs += 1
            if self._runs == 1:
                self._patch()
        try:
            yield
        finally:
            with _PATCHING:
                self._runs -= 1
                if not self._runs:
                    self._unpatch()
            _CALLS.by_graph[id(self)] = before

    def _patch(self) -> None:
        """Changes the modules: their forward asks who runs the graph."""

        def handed(layer: Layer, forward: Callable[..., Any]) -> Callable[..., Any]:
            def computed(*args: Any, **kwargs: Any) -> Any:
                call = _CALLS.by_graph.get(id(self))
                if call is None:
                    return forward(*args, **kwargs)
                _CALLS.by_graph[id(self)] = None  # `call` calls the module itself
                try:
                    return call(layer, args, kwargs)
                finally:
                    _CALLS.by_graph[id(self)] = call

            return computed

        modules = [(layer, layer.module) for layer in self.layers if layer.module is not None]
        self._patched = [(module, module.__dict__.get("forward")) for _, module in modules]
        for layer, module in modules:
            module.forward = handed(layer, module.forward)

    def _unpatch(self) -> None:
        """Changes the modules back."""
        for module, forward in self._patched:
            del module.forward
            if forward is not None:  # the module's own, not its class's
                module.forward = forward
        self._patched = []


def captured(model: nn.Module, example: Any, dynamic: Sequence[int], on_failure: str) -> LayerGraph:
    """The captured model; where capture fails and `on_failure` is 'modules', its modules as layers."""
    if on_failure not in ("raise", "modules"):
        raise InputError(f"on_capture_failure is 'raise' or 'modules'; got {on_failure!r}.")
    try:
        return capture(model, example, dynamic)
    except CaptureError as error:
        if on_failure == "raise":
            raise
        return module_graph(model, example, str(error).partition(". ")[0])


def module_graph(model: nn.Module, example: Any, reason: str) -> ModuleGraph:
    """The modules of `model` as layers, in the order in which the example calls them; `reason`: why not captured.

    Raises CaptureError for what is no model or no example; an error of the model on the example stays its own.
    """
    own = admitted(model)
    args, kwargs = example_arguments(own, example)
    check_example(args, kwargs)
    args, kwargs = on_device_of(own, (args, kwargs))
    register_results(result_of(own, args, kwargs))
    flat, in_spec = pytree.tree_flatten((args, kwargs))
    parameters = positional_parameters(own)
    signature = [p.name for p in parameters] if parameters is not None else [f"arg{i}" for i in range(len(args))]
    names = _input_names(signature, args, kwargs)
    modules = {module: name for name, module in own.named_modules() if name and not any(module.children())}
    taken = {name for name, _ in own.named_modules()}
    inputs = [_input(_free(name, taken), value) for name, value in zip(names, flat, strict=True)]
    code = Layer(_free("forward", taken), None, None, None, kind=CODE)
    code.dtype = torch.float32
    watched = _watch(own, args, kwargs, modules, inputs, code)
    before = {id(layer) for layer in (*inputs, code)}
    for layer in watched.layers.values():  # what a later call of the module takes may come after its first one
        layer.args = tuple({id(s): s for s in (a if id(a) in before else code for a in layer.args)}.values())
        before.add(id(layer))
    unseen = [_module_layer(name, module) for module, name in modules.items() if module not in watched.layers]
    for layer in unseen:
        layer.kind, layer.dtype = UNCALLED, torch.float32
    result = Layer(_free("result", taken), _passed, None, None, tuple(watched.elsewhere.values()), kind="result")
    layers = [*inputs, code, *watched.layers.values(), *unseen, result]
    batch = next(tensor.shape[0] for tensor in tensors_of((args, kwargs)) if tensor.dim())
    for layer in watched.layers.values():
        if layer.shape:
            layer.shape = (None if layer.shape[0] == batch else layer.shape[0], *layer.shape[1:])
    _, leaf = pytree.tree_flatten(0)
    graph = ModuleGraph(own, layers, [result], in_spec, leaf, signature, len(args), list(kwargs))
    graph.reason = reason
    return graph


def _input_names(signature: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    leaves, _ = pytree.tree_flatten_with_path((dict(zip(signature, args, strict=False)), kwargs))
    return [f"{path[1].key}{pytree.keystr(path[2:])}" for path, _ in leaves]


def _free(name: str, taken: set[str]) -> str:
    """`name`, or the next like it that no module and no other layer has."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _input(name: str, value: Any) -> Layer:
    layer = Layer(name, None, None, None, kind="input")
    if isinstance(value, Tensor):
        layer.shape, layer.dtype, layer.example_shape = (None,) * value.dim(), value.dtype, tuple(value.shape)
    else:
        layer.constant = value
    return layer


def _module_layer(name: str, module: nn.Module) -> Layer:
    return Layer(name, None, module, name)


def _passed(*values: Any) -> Any:
    return values[0]


# Watching one run -----------------------------------------------------------------------------------------------------


@dataclass
class _Watched:
    """layers: of the modules called, in order of their first call. elsewhere: those whose result is used by code."""

    layers: dict[nn.Module, Layer] = field(default_factory=dict)
    elsewhere: dict[str, Layer] = field(default_factory=dict)


def _watch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    modules: dict[nn.Module, str],
    inputs: list[Layer],
    code: Layer,
) -> _Watched:
    """Runs the model once; which module takes which module's result as it is, and which results other code takes."""
    args, kwargs = cloned(args), cloned(kwargs)
    watched, made = _Watched(), _Made(code)
    for layer, value in zip(inputs, pytree.tree_leaves((args, kwargs)), strict=True):
        made.add(value, layer)
    spy = _Spy(made, watched)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        layer = watched.layers.setdefault(module, _module_layer(modules[module], module))
        sources = [made.by(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        layer.args = tuple({source.name: source for source in (*layer.args, *sources) if source is not layer}.values())
        spy.depth += 1

    def after(module: nn.Module, _args: Any, _kwargs: Any, value: Any) -> None:
        spy.depth -= 1
        layer = watched.layers[module]
        if isinstance(value, Tensor):
            layer.shape, layer.dtype = tuple(value.shape), value.dtype
        made.add(value, layer)

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad(), without_fused_attention(), spy:
            result = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    spy.use(result)
    return watched


class _Made:
    """Which layer made a tensor, as long as nobody has written to it since."""

    def __init__(self, code: Layer) -> None:
        self._code = code
        self._known: dict[int, tuple[Tensor, int, Layer]] = {}  # holds the tensors, so that no other gets their id

    def add(self, value: Any, layer: Layer) -> None:
        """Changes what is known: `layer` made the tensors in `value`."""
        for tensor in tensors_of(value):
            self._known[id(tensor)] = (tensor, tensor._version, layer)

    def by(self, value: Tensor) -> Layer:
        """The layer that made `value`, that of the code where none did."""
        _, version, layer = self._known.get(id(value), (None, -1, self._code))
        return layer if value._version == version else self._code


class _Spy(TorchFunctionMode):
    """Notes whose results the code between the modules computes with."""

    def __init__(self, made: _Made, watched: _Watched) -> None:
        super().__init__()
        self.depth = 0  # of modules that are layers
        self._made, self._watched = made, watched

    def use(self, value: Any) -> None:
        """Notes that code takes the tensors in `value`."""
        for tensor in tensors_of(value):
            layer = self._made.by(tensor)
            if layer.module is not None:
                self._watched.elsewhere[layer.name] = layer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.depth:
            return func(*args, **(kwargs or {}))
        taken = [(tensor, self._made.by(tensor)) for tensor in tensors_of((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        if tensors_of(result):  # asking for a shape is no use
            for _, layer in taken:
                if layer.module is not None:
                    self._watched.elsewhere[layer.name] = layer
        return result
