"""The encodings of a sim, and files of them in AIMET's schemas 0.6.1, 1.0.0 and 2.0.0."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.export.encodings_file import VERSIONS, Entry
from qlab.export.grids import offset_of, tensor_shaped
from qlab.export.tensors import bias_name, governed, weight_quantizers
from qlab.graph import Layer
from qlab.quantization import Encoding, Scheme
from qlab.sim import QuantSim


@dataclass(frozen=True)
class Encodings:
    """What a sim has to tell: grids of activations in order of execution, of parameters, and of int32 biases."""

    activations: tuple[Entry, ...]
    parameters: tuple[Entry, ...]
    biases: tuple[Entry, ...]


def encodings_of(sim: QuantSim) -> Encodings:
    """The grids in force, each under the name of its tensor. Raises NotCalibrated where one is missing.

    A layer that inherits its grid is listed with it. What is switched off or stays float is not listed.
    """
    activations: list[Entry] = []
    parameters: list[Entry] = []
    for layer, _, quantizer in governed(sim):
        entry = entry_of(layer.name, quantizer.required_encoding(), quantizer.scheme)
        (activations if layer.owner is None else parameters).append(entry)
    for name, quantizer in weight_quantizers(sim).items():
        rank = quantizer.weight.dim()
        parameters.append(entry_of(name, quantizer.required_encoding(), quantizer.scheme, rank))
    biases = {layer.name: bias for layer in sim.graph if (bias := _bias_entry(sim, layer)) is not None}
    return Encodings(tuple(activations), tuple(parameters), tuple(biases.values()))


def entry_of(name: str, encoding: Encoding, scheme: Scheme, rank: int = 0) -> Entry:
    """One grid as files tell it. rank: of the tensor, needed for blocks."""
    scale, offset = encoding.scale.detach().cpu(), offset_of(encoding).detach().cpu()
    axis = encoding.axis
    if encoding.block_size is not None:
        scale, offset = (tensor_shaped(values, encoding, rank) for values in (scale, offset))
        axis = encoding.block_axis
    return Entry(name, encoding.bits, scheme is not Scheme.ASYMMETRIC, scale, offset, axis, encoding.block_size)


def _bias_entry(sim: QuantSim, layer: Layer) -> Entry | None:
    """The grid on which an integer target holds the bias: input scale times weight scale, int32."""
    entry, grid = sim.placed[layer.name], sim.input_quantizer(layer)
    bias = getattr(layer.module, "bias", None)
    if entry.weight is None or not entry.weight.enabled or (bias is None and entry.weight.bias_correction is None):
        return None
    if layer.module is None or grid is None or not grid.enabled:
        return None
    scale = grid.required_encoding().scale * entry.weight.required_encoding().scale
    if scale.dim() > 1 or grid.required_encoding().scale.dim():
        return None
    scale = scale.detach().cpu()
    return Entry(bias_name(layer), 32, True, scale, torch.full_like(scale, -(2.0**31)), 0 if scale.dim() else None)


def compose(sim: QuantSim, version: str) -> str:
    """The text of an encodings file of that schema. Raises InputError where the schema cannot say what the sim has."""
    if version not in VERSIONS:
        raise InputError(f"encodings must be one of {', '.join(map(repr, VERSIONS))}; got {version!r}.")
    found = encodings_of(sim)
    producer = {"package": "qlab", "version": version_of_qlab()}
    if version == "2.0.0":
        entries = (*found.parameters, *found.biases, *found.activations)
        return json.dumps({"producer": producer, "version": version, "encodings": compose_onnx(entries)}, indent=2)
    write = compose_dictionaries if version == "0.6.1" else compose_lists
    return json.dumps(
        {
            "activation_encodings": write(found.activations),
            "excluded_layers": [name for name, entry in sim.placed.items() if entry.reason == "skipped by the preset"],
            "param_encodings": write(found.parameters),
            "producer": producer,
            "quantizer_args": _arguments(sim),
            "version": version,
        },
        indent=4,
    )


def _arguments(sim: QuantSim) -> dict[str, Any]:
    """What the sim was made with, for people: AIMET's readers do not use it."""
    preset = sim.preset
    return {
        "activation_bitwidth": preset.output.bits,
        "dtype": "int",
        "is_symmetric": preset.weight.scheme is not Scheme.ASYMMETRIC,
        "param_bitwidth": preset.weight.bits,
        "per_channel_quantization": str(preset.weight.granularity) == "per_channel",
        "quant_scheme": str(preset.output.rule),
    }


def compose_dictionaries(entries: Iterable[Entry]) -> dict[str, Any]:
    """The entries as schema 0.6.1 has them."""

    def grids(entry: Entry) -> list[dict[str, Any]]:
        assert entry.bits is not None and entry.scale is not None and entry.offset is not None  # noqa: PT018
        if entry.block_size is not None:
            raise InputError(
                f"{entry.name!r} is quantized in blocks, which encodings 0.6.1 cannot say. Export with "
                "encodings='1.0.0'."
            )
        found = []
        for scale, offset in zip(_list(entry.scale), _list(entry.offset), strict=True):
            found.append(
                {
                    "bitwidth": entry.bits,
                    "dtype": "int",
                    "is_symmetric": str(bool(entry.symmetric)),
                    "max": scale * (_steps(entry.bits, bool(entry.symmetric), int(offset)) + offset),
                    "min": scale * offset,
                    "offset": int(offset),
                    "scale": scale,
                }
            )
        return found

    return {entry.name: grids(entry) for entry in entries}


def compose_lists(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The entries as schema 1.0.0 has them."""
    found = []
    for entry in entries:
        assert entry.scale is not None and entry.offset is not None  # noqa: PT018
        kind = "PER_TENSOR" if entry.scale.dim() == 0 else "PER_CHANNEL"
        item: dict[str, Any] = {
            "bw": entry.bits,
            "dtype": "INT",
            "enc_type": "PER_BLOCK" if entry.block_size is not None else kind,
            "is_sym": bool(entry.symmetric),
            "name": entry.name,
            "offset": [int(value) for value in _list(entry.offset)],
            "scale": _list(entry.scale),
        }
        if entry.block_size is not None:
            item["block_size"] = entry.block_size
        found.append(item)
    return found


def compose_onnx(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The entries as schema 2.0.0 has them."""
    found = []
    for entry in entries:
        assert entry.bits is not None and entry.scale is not None and entry.offset is not None  # noqa: PT018
        signed = bool(entry.symmetric) and bool((entry.offset != 0).any())
        zero_point = torch.zeros_like(entry.offset) if signed else -entry.offset
        item: dict[str, Any] = {
            "name": entry.name,
            "output_dtype": f"{'' if signed else 'u'}int{entry.bits}",
            "y_scale": entry.scale.tolist(),
        }
        if bool(zero_point.any()):
            item["y_zero_point"] = zero_point.to(torch.int64).tolist()
        if entry.axis is not None:
            item["axis"] = entry.axis
        if entry.block_size is not None:
            item["block_size"] = entry.block_size
        found.append(item)
    return found


def _steps(bits: int, symmetric: bool, offset: int) -> int:
    """The largest integer of the grid, counted from its smallest."""
    strict = symmetric and offset == -(2 ** (bits - 1) - 1)
    return 2**bits - 2 if strict else 2**bits - 1


def _list(values: Tensor) -> list[float]:
    return [float(value) for value in values.reshape(-1)]


def version_of_qlab() -> str:
    """The version of this package."""
    import qlab

    return qlab.__version__
