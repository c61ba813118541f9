"""The captured graph as a float ONNX model whose tensors bear the layers' names.

PyTorch's exporter (dynamo) translates layer by layer; each layer's value, and each weight on its way into its layer,
passes a marker that carries a name. Markers keep the exporter from merging layers, and are dissolved into tensor names
afterwards, so that what a tensor is called never depends on the exporter.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlab.errors import InputError
from qlab.export.tensors import ParameterNames, bias_name, updated_values
from qlab.graph import Layer, call_layer
from qlab.quantization import WeightQuantizer
from qlab.sim import QuantSim

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

DOMAIN = "qlab.marker"


@dataclass(frozen=True)
class Marked:
    """An exported model that still holds its markers, and what is needed to dissolve them.

    values: the arrays that replace parameters in the files: updated weights and biases, by parameter name.
    """

    model: "ModelProto"
    inputs: tuple[str, ...]
    values: dict[str, Tensor]

    def resolved(self, read_as: Mapping[tuple[str, str], str] | None = None) -> "ModelProto":
        """A model without markers.

        read_as: the tensor that a layer reads in place of a parameter, by (layer, parameter) names.
        """
        return _dissolve(self, read_as or {})


def trace(sim: QuantSim, opset: int) -> Marked:
    """The captured graph of `sim` by the dynamo exporter, in float, for any batch size."""
    example, shapes = example_inputs(sim)
    training = sim.training
    sim.eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Traced(sim), example, dynamo=True, dynamic_shapes=(shapes,), opset_version=opset, verbose=False
            )
    except Exception as error:
        raise InputError(_explain(error)) from error
    finally:
        sim.train(training)
    assert program is not None
    names = tuple(layer.name for layer in sim.graph.input_layers if layer.shape is not None)
    return Marked(program.model_proto, names, updated_values(sim))


def example_inputs(sim: QuantSim) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Zeros as the model was captured with, one tensor an input, and which of their axes may change."""
    layers = [layer for layer in sim.graph.input_layers if layer.shape is not None]
    free = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(layer.shape or ()) if size is None}
        for layer in layers
    )
    return tuple(_zeros(layer, sim.device) for layer in layers), free


class _Traced(nn.Module):
    """The graph as a module of flat tensor inputs, every value marked with its name."""

    def __init__(self, sim: QuantSim) -> None:
        super().__init__()
        self.model = sim.model
        self._sim = (sim,)  # not a child: the sim's quantizers are no part of the float model
        self._names = ParameterNames(sim.model)

    def forward(self, *tensors: Tensor) -> Any:
        sim, given = self._sim[0], iter(tensors)
        flat = [next(given) if layer.shape is not None else None for layer in sim.graph.input_layers]
        return sim.graph.run(flat, self._call)

    def _call(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = self._sim[0].placed[layer.name]
        quantizer = entry.weight
        if entry.carries_weight:
            assert quantizer is not None
            return _mark(call_layer(layer, args, kwargs), layer.name, self._names.weight(quantizer))
        if quantizer is not None and layer.module is not None:
            value = self._with_weight(layer, quantizer, args, kwargs)
        else:
            value = call_layer(layer, args, kwargs)
        return _mark(value, layer.name) if isinstance(value, Tensor) else value

    def _with_weight(self, layer: Layer, quantizer: WeightQuantizer, args: Any, kwargs: Any) -> Any:
        module: Any = layer.module
        weight = _mark(module.weight, layer.name, self._names.weight(quantizer))
        bias = getattr(module, "bias", None)
        if bias is None and quantizer.bias_correction is not None:
            bias = quantizer.bias_correction
        bias = None if bias is None else _mark(bias, layer.name, bias_name(layer))
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return module._conv_forward(args[0], weight, bias)
        if isinstance(module, nn.Linear):
            return F.linear(args[0], weight, bias)
        replaced = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(module, replaced, args, kwargs)


def _mark(value: Tensor, layer: str, parameter: str = "") -> Tensor:
    """`value` as what `layer` computes or, where a parameter is named, as what it reads."""
    attributes = {"name": layer, "parameter": parameter}
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Marker", (value,), attributes, dtype=value.dtype, shape=value.shape, version=1
    )


def _zeros(layer: Layer, device: torch.device) -> Tensor:
    sizes = layer.example_shape
    assert sizes is not None
    return torch.zeros(sizes, dtype=layer.dtype, device=device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about itself; what matters is raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _explain(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    first = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    return (
        f"PyTorch's ONNX exporter cannot translate the model: {first.strip()[:300]} "
        "sim.export(path, formats=['program', 'safetensors', 'encodings']) does without ONNX."
    )


# Markers to names -----------------------------------------------------------------------------------------------------


def _dissolve(marked: Marked, read_as: Mapping[tuple[str, str], str]) -> "ModelProto":
    from onnx import ModelProto, helper

    model = ModelProto()
    model.CopyFrom(marked.model)
    graph = model.graph
    initializers = {initializer.name for initializer in graph.initializer}
    final = {name: name.removeprefix("model.") for name in initializers if name.startswith("model.")}
    final.update({value.name: name for value, name in zip(graph.input, marked.inputs, strict=True)})
    nodes = []
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        attributes = {a.name: helper.get_attribute_value(a).decode() for a in node.attribute}
        (source,), (target,), name = node.input, node.output, attributes["name"]
        if parameter := attributes["parameter"]:
            final[source], final[target] = parameter, read_as.get((name, parameter), parameter)
        elif final.setdefault(source, name) == name:
            final[target] = name
        else:  # the layer passes on a value that has a name already
            nodes.append(helper.make_node("Identity", [source], [target]))
            final[target] = name
    _rename(graph, nodes, final)
    for initializer in graph.initializer:
        initializer.doc_string = ""
    del model.metadata_props[:]
    kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _rename(graph: "GraphProto", nodes: list["NodeProto"], final: dict[str, str]) -> None:
    """Changes `graph`: its nodes become `nodes`, its tensors are renamed; names of the exporter step aside."""
    taken = set(final.values())

    def new(name: str) -> str:
        if name not in final:
            fresh = name
            while fresh in taken:
                fresh += "_"
            final[name] = fresh
            taken.add(fresh)
        return final[name]

    for node in nodes:
        node.input[:] = [new(name) if name else "" for name in node.input]
        node.output[:] = [new(name) if name else "" for name in node.output]
        del node.metadata_props[:]  # the exporter's traces quote the user's files
        node.doc_string = ""
    kept = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = new(value.name)
    shapes = {new(value.name): value for value in graph.value_info}
    described = [copy.deepcopy(value) for value in shapes.values()]
    del graph.value_info[:]
    for name, value in zip(shapes, described, strict=True):
        value.name = name
        del value.metadata_props[:]
    graph.value_info.extend(described)
    graph.doc_string = ""
    del graph.metadata_props[:]
