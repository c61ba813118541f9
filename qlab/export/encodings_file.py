"""Encodings files in AIMET's schemas: read with suspicion, and written.

0.6.1: dictionaries of tensor name to a list of grids, one a channel; its sibling is keyed by module and side. 1.0.0:
lists, each entry with the scales of all channels or blocks. 2.0.0: one list that speaks as ONNX's QuantizeLinear does.
All become `Entry`, one form that counts zero as AIMET does; `qlab.export.grids` knows how the conventions differ.
Specification: AIMET's documentation, "Encoding Specification".
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.export.json_values import bits_of, expect, nested, numbers, positive, size_of, truth, whole

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
MAX_BYTES = 1 << 28
"""Larger files are refused unread: an encodings file of a network with 10 million channels has about this size."""


@dataclass(frozen=True)
class Entry:
    """The grid of one tensor as a file tells it.

    name: of the tensor, or of the module in a file keyed by module. bits: None for a tensor that stays float.
    symmetric: None where the schema does not say. scale, offset: [] or [channels] or, of blocks, with the rank of the
    tensor or flat; offset is minus the zero point counted from 0. axis: of channels, or of blocks where there are
    blocks; None where the schema does not say. block_size: None without blocks. side: ('input' or 'output', position)
    in a file keyed by module.
    """

    name: str
    bits: int | None
    symmetric: bool | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None
    axis: int | None = None
    block_size: int | None = None
    side: tuple[str, int] | None = None

    @property
    def label(self) -> str:
        """How to speak of it: the name, and the side where there is one."""
        return self.name if self.side is None else f"{self.name}.{self.side[0]}[{self.side[1]}]"


@dataclass(frozen=True)
class EncodingsFile:
    """What a file says. in_order: its activations are listed in order of execution."""

    version: str
    entries: tuple[Entry, ...]
    in_order: bool


def read(path: str | os.PathLike[str]) -> EncodingsFile:
    """The content of an encodings file; raises InputError, saying where, for anything that is not well-formed."""
    try:
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise InputError(f"{path} has {size:,} bytes; an encodings file of more than {MAX_BYTES:,} is not read.")
        return parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    except InputError as error:
        raise InputError(f"{path} is not a usable encodings file: {error}") from error


def parse(text: str) -> EncodingsFile:
    """The content of an encodings file given as text.

    >>> entry = '{"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 3}'
    >>> parse('{"version": "2.0.0", "encodings": [' + entry + ']}').entries[0].offset
    tensor(-3.)
    """
    try:
        content = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise InputError("it is nested too deeply.") from None
    except ValueError as error:
        raise InputError(f"it is not JSON: {error}.") from error
    top = expect(dict, content, "the file")
    version = expect(str, top.get("version", "0.4.0"), "'version'")
    if version.startswith("0."):
        entries, in_order = _read_dictionaries(top), False
    elif version == "1.0.0":
        entries, in_order = _read_lists(top), True
    elif version == "2.0.0":
        entries, in_order = _read_onnx(top), True
    else:
        raise InputError(f"its version is {version!r}; known are 0.x, 1.0.0 and 2.0.0.")
    _check_names(entries)
    return EncodingsFile(version, tuple(entries), in_order)


# Schema 0.6.1 ---------------------------------------------------------------------------------------------------------


def _read_dictionaries(top: dict[str, Any]) -> list[Entry]:
    entries: list[Entry] = []
    for name, found in expect(dict, top.get("activation_encodings"), "'activation_encodings'").items():
        if isinstance(found, dict):
            entries += _read_module(name, found)
        else:
            entries.append(_read_channels(name, found))
    for name, found in expect(dict, top.get("param_encodings"), "'param_encodings'").items():
        entries.append(_read_channels(name, found))
    return entries


def _read_module(name: str, sides: dict[str, Any]) -> list[Entry]:
    entries = []
    for side, positions in sides.items():
        if side not in ("input", "output"):
            raise InputError(f"{name!r} has a side {side!r}; known are 'input' and 'output'.")
        for position, found in expect(dict, positions, f"{name!r}.{side}").items():
            if not position.isdecimal() or len(position) > 6:
                raise InputError(f"{name!r}.{side} has a position {position!r}; expected a number.")
            entries.append(_read_channels(name, [found], (side, int(position))))
    return entries


def _read_channels(name: str, found: Any, side: tuple[str, int] | None = None) -> Entry:
    channels = [expect(dict, item, f"{name!r}") for item in expect(list, found, f"{name!r}")]
    if not channels:
        raise InputError(f"{name!r} has an empty list of grids.")
    first = channels[0]
    bits = bits_of(first.get("bitwidth"), name)
    if str(first.get("dtype", "int")).lower() == "float":
        return Entry(name, None, side=side)
    symmetric = truth(first.get("is_symmetric"), f"{name!r}: is_symmetric")
    for channel in channels:
        if channel.get("bitwidth") != first.get("bitwidth"):
            raise InputError(f"{name!r} has channels of different bits.")
    scale = numbers([channel.get("scale") for channel in channels], f"{name!r}: scale")
    offset = whole([channel.get("offset") for channel in channels], f"{name!r}: offset")
    if len(channels) == 1:
        scale, offset = scale[0], offset[0]
    return Entry(name, bits, symmetric, positive(scale, name), offset, side=side)


# Schema 1.0.0 ---------------------------------------------------------------------------------------------------------


def _read_lists(top: dict[str, Any]) -> list[Entry]:
    entries = []
    for section in ("activation_encodings", "param_encodings"):
        for item in expect(list, top.get(section), f"{section!r}"):
            entries.append(_read_listed(expect(dict, item, f"an entry of {section!r}")))
    return entries


def _read_listed(item: dict[str, Any]) -> Entry:
    name = expect(str, item.get("name"), "'name' of an entry")
    bits = bits_of(item.get("bw"), name)
    if item.get("dtype") in ("FLOAT", "FP"):
        return Entry(name, None)
    kind = item.get("enc_type")
    if kind not in ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK", "LPBQ"):
        raise InputError(f"{name!r} has enc_type {kind!r}; known are PER_TENSOR, PER_CHANNEL, PER_BLOCK and LPBQ.")
    symmetric = truth(item.get("is_sym"), f"{name!r}: is_sym")
    scale = numbers(expect(list, item.get("scale"), f"{name!r}: scale"), f"{name!r}: scale")
    offset = whole(expect(list, item.get("offset"), f"{name!r}: offset"), f"{name!r}: offset")
    if "zero_point_shift" in item:
        raise InputError(f"{name!r} shifts its zero point by a fraction; qlab's grids hold zero exactly.")
    if kind == "LPBQ":
        bits = bits_of(item.get("compressed_bw"), name)
        steps = whole(expect(list, item.get("per_block_int_scale"), f"{name!r}: per_block_int_scale"), name)
        if not len(scale) or len(steps) % len(scale):
            raise InputError(f"{name!r} has {len(steps)} block scales for {len(scale)} channels.")
        scale = (scale[:, None] * steps.reshape(len(scale), -1)).reshape(-1)
        offset = torch.full_like(scale, -(2 ** (bits - 1)))
    if scale.shape != offset.shape or not len(scale):
        raise InputError(f"{name!r} has {len(scale)} scales and {len(offset)} offsets.")
    block_size = size_of(item.get("block_size"), name) if kind in ("PER_BLOCK", "LPBQ") else None
    if kind == "PER_TENSOR":
        if len(scale) != 1:
            raise InputError(f"{name!r} is PER_TENSOR and has {len(scale)} scales.")
        scale, offset = scale[0], offset[0]
    return Entry(name, bits, symmetric, positive(scale, name), offset, block_size=block_size)


# Schema 2.0.0 ---------------------------------------------------------------------------------------------------------


def _read_onnx(top: dict[str, Any]) -> list[Entry]:
    return [
        _read_onnx_entry(expect(dict, item, "an entry")) for item in expect(list, top.get("encodings"), "'encodings'")
    ]


def _read_onnx_entry(item: dict[str, Any]) -> Entry:
    name = expect(str, item.get("name"), "'name' of an entry")
    kind = expect(str, item.get("output_dtype"), f"{name!r}: output_dtype")
    if re.fullmatch(r"b?float\w*", kind):
        return Entry(name, None)
    match = re.fullmatch(r"(u?)int(\d{1,2})", kind)
    if match is None:
        raise InputError(f"{name!r} has output_dtype {kind!r}; expected an integer type such as 'int8' or 'uint4'.")
    bits, signed = bits_of(int(match[2]), name), not match[1]
    if "per_block_int_scale" in item:
        factor = nested(item.get("per_channel_float_scale"), f"{name!r}: per_channel_float_scale")
        steps = nested(item.get("per_block_int_scale"), f"{name!r}: per_block_int_scale")
        if factor.dim() != steps.dim() or any(a not in (1, b) for a, b in zip(factor.shape, steps.shape, strict=True)):
            raise InputError(f"{name!r} has block scales {list(steps.shape)} and channel scales {list(factor.shape)}.")
        scale = factor * steps
    else:
        scale = nested(item.get("y_scale"), f"{name!r}: y_scale")
    zero = item.get("y_zero_point", 0)
    zero_point = nested(zero, f"{name!r}: y_zero_point")
    if zero_point.dim() and zero_point.shape != scale.shape:
        raise InputError(f"{name!r} has scales {list(scale.shape)} and zero points {list(zero_point.shape)}.")
    lowest = -(2 ** (bits - 1)) if signed else 0
    if bool(((zero_point < lowest) | (zero_point > lowest + 2**bits - 1) | (zero_point != zero_point.round())).any()):
        raise InputError(f"{name!r} has a zero point outside {kind}.")
    symmetric = False if bool(zero_point.any()) else None
    offset = (lowest - zero_point).expand_as(scale).contiguous()
    axis = item.get("axis")
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int) or not -8 <= axis < 8):
        raise InputError(f"{name!r} has axis {axis!r}; expected a whole number.")
    block_size = size_of(item["block_size"], name) if item.get("block_size") else None
    return Entry(name, bits, symmetric, positive(scale, name), offset, axis, block_size)


def _check_names(entries: list[Entry]) -> None:
    seen: set[tuple[str, tuple[str, int] | None]] = set()
    for entry in entries:
        if (entry.name, entry.side) in seen:
            raise InputError(f"{entry.label!r} is listed twice.")
        seen.add((entry.name, entry.side))


def _no_constant(word: str) -> float:
    raise InputError(f"it holds {word}, which is not a number.")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InputError("an object has two entries of the same name.")
    return found
