"""The encodings in a Q/DQ ONNX model that others wrote, as entries of an encodings file.

A grid belongs to the tensor that is quantized. What that tensor is called differs: QuantizeLinear reads it,
DequantizeLinear gives it back, stored weights carry a suffix. So every entry comes with the names that it may go by.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlab.errors import InputError
from qlab.export.encodings_file import Entry
from qlab.export.grids import IntegerType

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SUFFIX = re.compile(
    r"(_QuantizeLinear(_(In|Out)put)?|_DequantizeLinear(_Output)?|_quantized|_float|_dq|_q)(_\d+|/duplicated)?$"
)
_MOVES = ("Transpose", "Reshape", "Identity")
"""What a weight passes on its way into its operator, in some exporters' files: the grid of a tensor is that of it."""
_TYPE = re.compile(r"(u?)int(4|8|16|32)")


@dataclass(frozen=True)
class NamedEntry:
    """A grid, and the names that its tensor may go by, the likeliest first."""

    entry: Entry
    names: tuple[str, ...]

    @property
    def plain(self) -> str:
        """The likeliest name without what a quantizer put behind it."""
        return _SUFFIX.sub("", self.names[0])


def read_qdq(path: str | os.PathLike[str]) -> list[NamedEntry]:
    """The grids of all tensors, each once, in order. Raises InputError for a file that has none or is not ONNX."""
    import onnx

    try:
        model = onnx.load(os.fspath(path))
    except Exception as error:
        raise InputError(f"{path} cannot be read as an ONNX model: {str(error).splitlines()[0][:200]}") from error
    found = _grids(model)
    if not found:
        raise InputError(
            f"{path} has no QuantizeLinear or DequantizeLinear with constant scales. Quantize it in Q/DQ form: in "
            "ONNX Runtime by quant_format=QuantFormat.QDQ."
        )
    return found


def _grids(model: "ModelProto") -> list[NamedEntry]:
    from onnx import numpy_helper

    constants = {initializer.name: initializer for initializer in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in constants.items() if _is_small(tensor)}
    pairs: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in arrays:
            pairs[node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]].append(node)
    moved = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in _MOVES and n.input[0] in constants}
    beside = _beside_a_bias(model, constants)
    entries: dict[str, NamedEntry] = {}
    for integers, nodes in pairs.items():
        names = _names(integers, nodes)
        names += tuple(known[name] for known in (moved, beside) for name in names if name in known)
        entry = _entry(names[0], nodes[0], arrays, constants.get(integers))
        entries.setdefault(names[0], NamedEntry(entry, names))
    return list(entries.values())


def _beside_a_bias(model: "ModelProto", constants: dict[str, Any]) -> dict[str, str]:
    """'fc.weight' for a stored weight that nobody named (torchao: '_frozen_param0') and that goes with 'fc.bias'."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    found: dict[str, str] = {}
    for start in model.graph.node:
        if start.op_type != "DequantizeLinear" or start.input[0] not in constants:
            continue
        tensor, user = start.output[0], _only(readers[start.output[0]])
        while user is not None and user.op_type in _MOVES:
            tensor, user = user.output[0], _only(readers[user.output[0]])
        if user is None or len(user.input) < 2 or user.input[1] != tensor:
            continue
        added = _only(readers[user.output[0]]) if user.op_type == "MatMul" else user
        biases = [name for name in added.input if name.endswith(".bias") and name in constants] if added else []
        if len(biases) == 1:
            found[start.output[0]] = f"{biases[0].removesuffix('.bias')}.weight"
    return found


def _only(nodes: list["NodeProto"]) -> "NodeProto | None":
    return nodes[0] if len(nodes) == 1 else None


def _names(integers: str, nodes: list["NodeProto"]) -> tuple[str, ...]:
    given = [name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output]
    given += [node.input[0] for node in nodes if node.op_type == "QuantizeLinear"]
    return tuple(dict.fromkeys([*given, integers, *(_SUFFIX.sub("", name) for name in (*given, integers))]))


def _entry(name: str, node: "NodeProto", arrays: dict[str, Any], stored: Any) -> Entry:
    scale = torch.from_numpy(arrays[node.input[1]].astype("float32"))
    zero_name = node.input[2] if len(node.input) > 2 else ""
    kind = _kind(node, stored, zero_name and arrays.get(zero_name))
    match = _TYPE.fullmatch(kind)
    if match is None:
        return Entry(name, None)
    lowest = IntegerType(int(match[2]), not match[1]).limits[0]
    zero = torch.zeros_like(scale)
    if zero_name in arrays:
        zero = torch.from_numpy(arrays[zero_name].astype("float64")).float().expand_as(scale)
    axis: int | None = _attribute(node, "axis", 1)
    block_size = _attribute(node, "block_size", 0) or None
    if scale.numel() == 1 and block_size is None:
        scale, zero, axis = scale.reshape(()), zero.reshape(()), None
    symmetric = False if bool(zero.any()) else None
    return Entry(name, int(match[2]), symmetric, scale, lowest - zero, axis, block_size)


def _kind(node: "NodeProto", stored: Any, zero_point: Any) -> str:
    """The integer type: that of the zero point, of the stored tensor, or uint8 as the operator has it without."""
    from onnx import helper

    if zero_point is not None and not isinstance(zero_point, str):
        return str(zero_point.dtype)
    if stored is not None:
        return str(helper.tensor_dtype_to_np_dtype(stored.data_type))
    return "uint8"


def _attribute(node: "NodeProto", name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _is_small(tensor: Any) -> bool:
    """Whether it may be scales or zero points: weights are left where they are."""
    count = 1
    for size in tensor.dims:
        count *= size
    return count <= 1 << 24 and tensor.data_location != 1
