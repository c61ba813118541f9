"""A sim as ONNX with QuantizeLinear and DequantizeLinear: what runtimes turn into integer kernels.

Around each quantized value `name` of the float model: `name_float` is what the layer computes, `name_q` its integers,
and `name` what they stand for, the value that the simulation computes. Model inputs and parameters keep their name
and are read as `name_dq`. A layer that inherits its grid gets the same pair again: its values are on that grid, so
nothing changes, and runtimes see integers on both sides of it.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qlab.export.float_model import Marked
from qlab.export.grids import IntegerType, tensor_shaped
from qlab.export.tensors import ParameterNames, bias_name, governed, weight_quantizers
from qlab.graph import Layer
from qlab.quantization import Encoding, Quantizer, quantize
from qlab.sim import QuantSim, Role

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

KEEPS_VALUES = frozenset(
    {"reshape", "transpose", "slice", "getitem", "expand", "identity", "dropout", "max_pool", "max", "zero_pad", "cat"}
    | {"relu", "upsample_nearest"}
)
"""Inheriting kinds that may be surrounded by the inherited grid: each value is one of the input's, or zero."""


@dataclass(frozen=True)
class Stored:
    """A tensor's grid as ONNX holds it.

    scale, zero_point: arrays shaped as QuantizeLinear asks. attributes: axis and block_size where needed.
    """

    encoding: Encoding
    type: IntegerType
    scale: np.ndarray
    zero_point: np.ndarray
    attributes: dict[str, int]

    @classmethod
    def of(cls, encoding: Encoding, shape: tuple[int, ...] | None = None) -> "Stored":
        """`shape`: of the tensor, needed for blocks."""
        scale, zero_point, attributes = encoding.scale, encoding.zero_point, {}
        if encoding.block_size is not None:
            assert shape is not None
            wide = [-1 if axis == encoding.block_axis else size for axis, size in enumerate(shape)]
            scale = tensor_shaped(scale, encoding, len(shape)).expand(wide)
            zero_point = tensor_shaped(zero_point, encoding, len(shape)).expand(wide)
            attributes = {"axis": encoding.block_axis, "block_size": encoding.block_size}
        elif encoding.axis is not None:
            attributes = {"axis": encoding.axis}
        return cls(
            encoding,
            IntegerType.holding(encoding),
            scale.detach().cpu().contiguous().numpy().astype(np.float32),
            zero_point.detach().cpu().contiguous().numpy().astype(np.int64),
            attributes,
        )


def needed_opset(sim: QuantSim) -> int:
    """21 where 4-bit or 16-bit integers or blocks are stored, else 20."""
    grids = [quantizer.required_encoding() for _, _, quantizer in governed(sim)]
    grids += [q.required_encoding() for q in weight_quantizers(sim).values()]
    wide = any(IntegerType.holding(grid).bits != 8 or grid.block_size is not None for grid in grids)
    return 21 if wide else 20


def float_model(marked: Marked) -> "ModelProto":
    """The float model with the updated weights."""
    model = marked.resolved()
    _replace_values(model, marked.values)
    return model


def quantized_model(sim: QuantSim, marked: Marked, integer_weights: bool) -> "ModelProto":
    """The model with Q/DQ pairs. integer_weights: weights are stored as integers instead of float and quantized."""
    names = ParameterNames(sim.model)
    weights = weight_quantizers(sim)
    read_as = {
        (layer.name, name): f"{name}_dq"
        for layer in sim.graph
        if (entry := sim.placed[layer.name]).weight is not None and (name := names.weight(entry.weight)) in weights
    }
    biases = _integer_biases(sim, marked)
    read_as |= {(layer.name, bias_name(layer)): f"{layer.name}.bias_dq" for layer in biases}
    model = marked.resolved(read_as)
    _replace_values(model, marked.values)
    insertion = _Insertion(model)
    for layer, entry, quantizer in governed(sim):
        if entry.role is Role.INHERITS and not _may_repeat(layer, quantizer):
            continue
        insertion.value(layer.name, quantizer)
    for name, quantizer in weights.items():
        insertion.weight(name, quantizer, integer_weights)
    for layer, (codes, scale) in biases.items():
        insertion.bias(layer.name, codes, scale)
    insertion.finish()
    return model


def _may_repeat(layer: Layer, quantizer: Quantizer) -> bool:
    if quantizer.required_encoding().axis is not None:  # channels may have moved to another axis
        return False
    if layer.kind == "zero_pad":
        values = [a for a in layer.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        return not any(values)
    return layer.kind in KEEPS_VALUES


def _integer_biases(sim: QuantSim, marked: Marked) -> dict[Layer, tuple[Tensor, Tensor]]:
    """Integers and scale of each bias that the simulation rounds to int32."""
    found: dict[Layer, tuple[Tensor, Tensor]] = {}
    for layer in sim.graph:
        scale = sim.bias_scale(layer)
        if scale is None or layer.module is None:
            continue
        bias = marked.values.get(bias_name(layer), getattr(layer.module, "bias", None))
        if bias is None:
            continue
        codes = (bias.detach().double() / scale.double()).round()
        if float(codes.abs().max()) < 2**31:
            found[layer] = (codes.to(torch.int32).cpu(), scale.detach().cpu())
    return found


def _replace_values(model: "ModelProto", values: dict[str, Tensor]) -> None:
    from onnx import numpy_helper

    for initializer in model.graph.initializer:
        if initializer.name in values:
            value = values[initializer.name].detach().cpu().contiguous().numpy()
            initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))


class _Insertion:
    """Changes `model`: collects the nodes to insert, and puts them behind the tensors that they read."""

    def __init__(self, model: "ModelProto") -> None:
        self._graph = model.graph
        self._inputs = {value.name for value in model.graph.input}
        self._constants = {initializer.name: initializer for initializer in model.graph.initializer}
        self._computed = {name for node in model.graph.node for name in node.output}
        self._read = {name for node in model.graph.node for name in node.input}
        self._after: dict[str, list[NodeProto]] = defaultdict(list)
        self._renamed_reads: dict[str, str] = {}
        self._renamed_results: dict[str, str] = {}
        self._grids: dict[int, tuple[str, str]] = {}
        self._new: list[TensorProto] = []
        self._first: list[NodeProto] = []

    def value(self, name: str, quantizer: Quantizer) -> None:
        stored = Stored.of(quantizer.required_encoding())
        grid = self._grid(quantizer.name, quantizer, stored)
        if name in self._computed:
            self._renamed_results[name] = f"{name}_float"
            self._after[f"{name}_float"] = self._pair(f"{name}_float", name, name, stored, grid)
        elif name in self._inputs or name in self._constants:
            self._renamed_reads[name] = f"{name}_dq"
            self._after[name] = self._pair(name, name, f"{name}_dq", stored, grid)

    def weight(self, name: str, quantizer: Quantizer, integer: bool) -> None:
        parameter = self._constants[name]
        stored = Stored.of(quantizer.required_encoding(), tuple(parameter.dims))
        scale, zero_point = self._grid(name, quantizer, stored)
        if not integer:
            self._after[name] = self._pair(name, name, f"{name}_dq", stored, (scale, zero_point), clip=False)
            return
        from onnx import helper, numpy_helper

        weight = torch.from_numpy(numpy_helper.to_array(parameter).copy())
        codes = quantize(weight, quantizer.required_encoding().to("cpu")).numpy()
        self._new.append(_tensor(f"{name}_q", codes, stored.type.name))
        target = f"{name}_dq"
        if name not in self._read:  # nothing needs the float weight, so its name is free for what the integers mean
            self._renamed_reads[target] = name
            target = name
        pair = [f"{name}_q", scale, zero_point]
        self._first.append(helper.make_node("DequantizeLinear", pair, [target], **stored.attributes))

    def bias(self, layer: str, codes: Tensor, scale: Tensor) -> None:
        from onnx import helper

        name = f"{layer}.bias"
        self._new.append(_tensor(f"{name}_q", codes.numpy(), "int32"))
        self._new.append(_tensor(f"{name}_scale", scale.numpy(), "float"))
        attributes = {"axis": 0} if scale.dim() else {}
        node = helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale"], [f"{name}_dq"], **attributes)
        self._first.append(node)

    def finish(self) -> None:
        nodes = list(self._first)
        for name in (*self._inputs, *(i.name for i in self._graph.initializer)):
            nodes += self._after.pop(name, [])
        for node in self._graph.node:
            node.input[:] = [self._renamed_reads.get(name, name) for name in node.input]
            node.output[:] = [self._renamed_results.get(name, name) for name in node.output]
            nodes.append(type(node).FromString(node.SerializeToString()))
            for name in node.output:
                nodes += self._after.pop(name, [])
        assert not self._after
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input} | {value.name for value in self._graph.output}
        read -= {name for node in nodes for name in node.output}
        kept = [type(i).FromString(i.SerializeToString()) for i in self._graph.initializer if i.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend((*kept, *self._new))
        del self._graph.value_info[:]  # shapes are inferred again by whoever needs them

    def _grid(self, stem: str, quantizer: Quantizer, stored: Stored) -> tuple[str, str]:
        """The names of the scale and zero point of `quantizer`, added once."""
        if id(quantizer) not in self._grids:
            names = f"{stem}_scale", f"{stem}_zero_point"
            self._new.append(_tensor(names[0], stored.scale, "float"))
            self._new.append(_tensor(names[1], stored.zero_point, stored.type.name))
            self._grids[id(quantizer)] = names
        return self._grids[id(quantizer)]

    def _pair(
        self, source: str, stem: str, target: str, stored: Stored, grid: tuple[str, str], clip: bool = True
    ) -> list["NodeProto"]:
        from onnx import helper

        nodes: list[Any] = []
        if clip and not stored.type.is_filled_by(stored.encoding):  # the type saturates later than the grid
            nodes, source = self._clipped(source, stem, stored)
        nodes.append(helper.make_node("QuantizeLinear", [source, *grid], [f"{stem}_q"], **stored.attributes))
        nodes.append(helper.make_node("DequantizeLinear", [f"{stem}_q", *grid], [target], **stored.attributes))
        return nodes

    def _clipped(self, source: str, stem: str, stored: Stored) -> tuple[list["NodeProto"], str]:
        from onnx import helper

        bounds = {"lowest": stored.encoding.minimum, "highest": stored.encoding.maximum}
        for word, bound in bounds.items():
            self._new.append(_tensor(f"{stem}_{word}", bound.detach().cpu().numpy(), "float"))
        nodes = [
            helper.make_node("Max", [source, f"{stem}_lowest"], [f"{stem}_raised"]),
            helper.make_node("Min", [f"{stem}_raised", f"{stem}_highest"], [f"{stem}_clipped"]),
        ]
        return nodes, f"{stem}_clipped"


def _tensor(name: str, values: np.ndarray, kind: str) -> "TensorProto":
    """An initializer of plain bytes: as a list of numbers, a negative integer would take ten."""
    from onnx import TensorProto, helper

    flat = np.asarray(values).reshape(-1)
    if kind in ("int4", "uint4"):
        nibbles = np.append(flat, 0)[: flat.size + flat.size % 2].astype(np.int8).view(np.uint8) & 0xF
        flat = nibbles[0::2] | nibbles[1::2] << 4
    else:
        flat = flat.astype(np.dtype("float32" if kind == "float" else kind).newbyteorder("<"))
    return helper.make_tensor(name, getattr(TensorProto, kind.upper()), np.shape(values), flat.tobytes(), raw=True)
