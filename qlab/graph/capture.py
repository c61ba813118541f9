"""Capture: torch.export reads the model, then the user's own torch.nn modules are given back as layers.

Export flattens a model into ATen calls. The calls recorded inside one call of a torch.nn leaf become one layer that
calls that module again, under the user's name; what remains are functions, named after the module that called them.
The model itself is never changed: capture works on a deep copy.
"""

import keyword
import operator
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qlab.errors import CaptureError
from qlab.graph.admission import (
    admitted,
    readable,
    readable_forward,
    register_results,
    result_of,
    unreadable,
    without_fused_attention,
)
from qlab.graph.example import (
    at_least_two,
    check_example,
    cloned,
    example_arguments,
    on_device_of,
    positional_parameters,
    tensors_of,
)
from qlab.graph.layer_graph import Layer, LayerGraph, call_layer
from qlab.graph.step import Step
from qlab.graph.tracing import exported, is_users, size_of


def capture(model: nn.Module, example: Any, dynamic: Sequence[int] = ()) -> LayerGraph:
    """The layers of `model`, found by running torch.export on `example`.

    example: a tensor, a tuple of positional arguments, a dict of keyword arguments, or the first batch of a loader (of
    (x, y) the part that `forward` takes). dynamic: axes beside the batch whose size may change, such as (2, 3).
    Raises CaptureError with the user's file and line where the model cannot be captured, or the first differing layer
    where the captured graph does not reproduce the model bit for bit.
    """
    own = admitted(model)
    args, kwargs = example_arguments(own, example)
    check_example(args, kwargs)
    args, kwargs = at_least_two(*on_device_of(own, (args, kwargs)))
    reference = result_of(own, args, kwargs)
    register_results(reference)
    left_out = unreadable(reference)
    if left_out and not tensors_of(reference):
        raise CaptureError(
            f"forward returns {' and '.join(left_out)}, in which no tensor can be seen. Return tensors, or tuples, "
            "lists, dicts or dataclasses of them."
        )
    with readable_forward(own, kwargs, reference):
        program = exported(own, args, kwargs, dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            flat = program.run_decompositions({}).module(check_guards=False)
        except SyntaxError as error:
            raise CaptureError(
                f"torch.export cannot write the model as code: {(error.text or '').strip()!r} is no Python. A module "
                "or parameter is called by a keyword, such as 'in'; rename it."
            ) from error
    graph = _to_layers(own, flat, program, args, kwargs)
    for layer, value in zip(graph.input_layers, pytree.tree_leaves((args, kwargs)), strict=True):
        layer.example_shape = tuple(value.shape) if isinstance(value, Tensor) else None
        layer.constant = None if isinstance(value, Tensor) else value
    graph.left_out = left_out
    _verify(graph, args, kwargs, readable(reference))
    return graph


# From the exported program to layers ----------------------------------------------------------------------------------


def _to_layers(
    root: nn.Module,
    flat: fx.GraphModule,
    program: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> LayerGraph:
    _regroup(flat.graph, root)
    _single_results(flat.graph)
    _dropouts(flat.graph, program.graph)
    _adopt_constants(flat, root)
    names = _Names(root)
    locations = getattr(root, "meta", {}).get("locations", {})  # of a prepared model: where each step was written
    layers: list[Layer] = []
    by_node: dict[fx.Node, Layer] = {}
    outputs: Sequence[Any] = ()
    for node in flat.graph.nodes:
        if node.op == "output":
            outputs = fx.map_arg(node.args[0], lambda n: by_node[n])
            continue
        if node.op == "call_function" and (node.name.startswith("_guards") or _writes_an_input(node)):
            continue
        convert = {"args": tuple(fx.map_arg(node.args, lambda n: by_node[n]))}
        kw = dict(fx.map_arg(node.kwargs, lambda n: by_node[n]))
        if node.op == "placeholder":
            layer = Layer(names.free(str(node.target)), None, None, None, kind="input")
        elif node.op == "get_attr":
            path = str(node.target)
            layer = Layer(names.free(path), None, None, path, kind="parameter")
            parent, _, layer.attribute = path.rpartition(".")
            layer.owner = root.get_submodule(parent)
        elif node.op == "call_module":
            module = root.get_submodule(str(node.target))
            layer = Layer(names.call(str(node.target)), None, module, str(node.target), convert["args"], kw)
        elif node.op == "call_function":
            layer = Layer("", node.target, None, None, _plain_lists(convert["args"]), _plain_lists(kw))
            word = getattr(node.target, "__name__", str(node.target)).split(".")[0].strip("_")
            word += "_" if keyword.iskeyword(word) else ""
            scope = _scope(node)
            step = root.get_submodule(scope)
            if not isinstance(step, Step):
                layer.name = names.function(scope, word)
            else:  # of a prepared model: the step's own name
                is_its_call = node.target is step.function
                layer.name = names.call(scope) if is_its_call else names.function(scope.rpartition(".")[0], word)
        else:
            raise CaptureError(f"unexpected graph node {node.op} {node.target}")
        _describe(layer, node)
        layer.location = layer.location or locations.get(layer.name, "")
        by_node[node] = layer
        layers.append(layer)
    parameters = positional_parameters(root)
    signature = [p.name for p in parameters] if parameters is not None else [f"arg{i}" for i in range(len(args))]
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    assert out_spec is not None
    return LayerGraph(root, layers, list(outputs), in_spec, out_spec, signature, len(args), list(kwargs))


def _writes_an_input(node: fx.Node) -> bool:
    """Whether the call writes into what the caller handed in: the graph leaves its inputs as they are."""
    target = node.args[0] if node.args else None
    return node.target is torch.ops.aten.copy_.default and isinstance(target, fx.Node) and target.op == "placeholder"


def _plain_lists(tree: Any) -> Any:
    """fx's immutable lists and dicts as plain ones, so that layers deep-copy and can be edited."""
    if isinstance(tree, (list, tuple)):
        return (list if isinstance(tree, list) else tuple)(_plain_lists(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _plain_lists(value) for key, value in tree.items()}
    return tree


def _regroup(graph: fx.Graph, root: nn.Module) -> None:
    """Changes the graph: calls recorded inside one call of a torch.nn leaf become one call of that leaf.

    Only where the call takes one value and gives one back; recurrent layers return several and stay functions.
    """
    leaves = {
        name: module
        for name, module in root.named_modules(remove_duplicate=False)
        if name and type(module).__module__.startswith("torch.nn.modules") and not any(module.children())
        if not isinstance(module, nn.RNNBase)
    }
    calls: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            name = path.split("@")[0]
            if name in leaves:
                calls[key, name].append(node)
    for (_, name), nodes in calls.items():
        group = set(nodes)
        outside = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in group and i.op != "get_attr")
        inputs = [i for i in outside if not isinstance(_value(i), (int, torch.SymInt))]  # sizes come from the input
        outputs = [n for n in nodes if any(user not in group for user in n.users)]
        if len(inputs) != 1 or len(outputs) != 1 or not isinstance(_value(inputs[0]), Tensor):
            continue
        with graph.inserting_before(outputs[0]):
            call = graph.create_node("call_module", name, tuple(inputs))
        call.meta = dict(outputs[0].meta)
        outputs[0].replace_all_uses_with(call)
        for node in reversed(nodes):
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("get_attr", "call_function") and not _has_effect(node):
            graph.erase_node(node)


def _single_results(graph: fx.Graph) -> None:
    """Changes the graph: BatchNorm written as a function returns its one tensor, as the user wrote it.

    Export turns it into a call that returns two empty tensors beside; no one could place or fold that.
    """
    native = torch.ops.aten._native_batch_norm_legit_no_training.default
    for node in [node for node in graph.nodes if node.op == "call_function" and node.target is native]:
        x, weight, bias, mean, variance, momentum, eps = node.args
        taken = list(node.users)
        if len(taken) != 1 or taken[0].target is not operator.getitem or taken[0].args[1] != 0:
            continue
        args = (x, weight, bias, mean, variance, False, momentum, eps, False)
        with graph.inserting_before(taken[0]):
            call = graph.call_function(torch.ops.aten.batch_norm.default, args)
        call.meta = dict(node.meta) | {"val": _value(taken[0])}
        taken[0].replace_all_uses_with(call)
        graph.erase_node(taken[0])
        graph.erase_node(node)


def _dropouts(graph: fx.Graph, exported_graph: fx.Graph) -> None:
    """Changes the graph: dropout as a function is a dropout again, where export left a copy of its input."""
    wanted = {node.name: node.args[1] for node in exported_graph.nodes if node.target is torch.ops.aten.dropout.default}
    for node in list(graph.nodes):
        source = node.meta.get("from_node") if node.target is torch.ops.aten.clone.default else None
        while source:  # back to the node as export first saw it
            name, source = source[-1].name, source[-1].from_node
            if not source and name in wanted:
                with graph.inserting_before(node):
                    call = graph.call_function(torch.ops.aten.dropout.default, (node.args[0], wanted[name], False))
                call.meta = dict(node.meta)
                node.replace_all_uses_with(call)
                graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema is None or schema.is_mutable)


def _adopt_constants(flat: fx.GraphModule, root: nn.Module) -> None:
    """Changes `root`: constants that export lifted out of the code become buffers of it, under their own names."""
    for node in flat.graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target)
        try:
            operator.attrgetter(path)(root)
        except AttributeError:
            parent, _, attribute = path.rpartition(".")
            value = operator.attrgetter(path)(flat)
            root.get_submodule(parent).register_buffer(attribute, value.detach().clone(), persistent=False)


class _Names:
    """Gives every layer a name of its own, none of which can be mistaken for a module."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = {name for name, _ in root.named_modules(remove_duplicate=False)}
        self._used: set[str] = set()

    def free(self, name: str) -> str:
        while name in self._used or name in self._modules:
            name += "_in" if name in self._modules else "_"
        self._used.add(name)
        return name

    def call(self, path: str) -> str:
        name, count = path, 0
        while name in self._used:
            count += 1
            name = f"{path}@{count}"
        self._used.add(name)
        return name

    def function(self, scope: str, word: str) -> str:
        base = f"{scope}.{word}" if scope else word
        name, count = base, 0
        while name in self._used or name in self._modules:
            count += 1
            name = f"{base}_{count}"
        self._used.add(name)
        return name


def _scope(node: fx.Node) -> str:
    """The path of the innermost module whose code made the call."""
    path = ""
    for found, _ in node.meta.get("nn_module_stack", {}).values():
        if not found.startswith("_empty"):
            path = found.split("@")[0]
    return path


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _describe(layer: Layer, node: fx.Node) -> None:
    value = _value(node)
    if layer.owner is not None:
        value = getattr(layer.owner, layer.attribute)
    if isinstance(value, Tensor):
        layer.shape = tuple(map(size_of, value.shape))
        layer.dtype = value.dtype
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in frames if is_users(file)]
    layer.location = own[-1] if own else ""


# Verification ---------------------------------------------------------------------------------------------------------


def _verify(graph: LayerGraph, args: tuple[Any, ...], kwargs: dict[str, Any], reference: Any) -> None:
    with torch.no_grad():
        result = graph.run(graph.bind(cloned(args), cloned(kwargs)))
    wanted, have = pytree.tree_leaves(reference), pytree.tree_leaves(result)
    same = len(wanted) == len(have) and all(_same(a, b) for a, b in zip(wanted, have, strict=True))
    if not same:
        raise CaptureError(_first_difference(graph, args, kwargs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a == b)


def _first_difference(graph: LayerGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Names the first layer whose module gives another value in the graph than inside the model."""
    seen: dict[str, list[Any]] = defaultdict(list)
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(cloned(out)))
        for name, module in graph.root.named_modules()
        if name
    ]
    differing: list[str] = []
    try:
        with torch.no_grad(), without_fused_attention():
            graph.root(*cloned(args), **cloned(kwargs))
            inside = {name: list(values) for name, values in seen.items()}
            counts: dict[str, int] = defaultdict(int)

            def call(layer: Layer, a: tuple[Any, ...], k: dict[str, Any]) -> Any:
                value = call_layer(layer, a, k)
                if layer.module is not None and layer.path in inside and isinstance(value, Tensor):
                    number = counts[layer.path]
                    counts[layer.path] += 1
                    if number < len(inside[layer.path]) and not _same(inside[layer.path][number], value):
                        differing.append(layer.name)
                return value

            graph.run(graph.bind(cloned(args), cloned(kwargs)), call)
    finally:
        for hook in hooks:
            hook.remove()
    first = differing[0] if differing else "a function between modules"
    return (
        f"the captured graph does not reproduce the model on the example; the first difference is at {first!r}. The "
        "model may draw random numbers in eval mode or keep state between calls. Make forward depend on its inputs "
        "and parameters only."
    )
