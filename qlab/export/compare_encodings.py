"""The grids of a sim beside those that others found: an ONNX file, an encodings file, or another sim."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.export.encodings_file import EncodingsFile, Entry, read
from qlab.export.encodings_write import encodings_of
from qlab.export.grids import IntegerType, shifted_to_unsigned
from qlab.export.loading import encoding_of, same_grid
from qlab.export.matching import Finder, Target, match
from qlab.export.qdq_reading import read_qdq
from qlab.quantization import Encoding, Quantizer, WeightQuantizer
from qlab.sim import QuantSim

SAME, DIFFERS, ONLY_HERE, ONLY_THERE, INCOMPARABLE = "same", "differs", "only here", "only there", "not comparable"
_EQUAL = 1e-6  # relative: two ways to compute a float32 scale differ in its last bits
_COLUMNS = ("tensor", "other", "state", "bits", "other_bits", "scale", "other_scale", "scale_difference")
_MORE = ("zero_point", "other_zero_point", "zero_point_difference", "note")


def compare_encodings(sim: QuantSim, other: "QuantSim | str | os.PathLike[str]") -> pd.DataFrame:
    """One row a tensor: the sim's grid, the other's, and how far they are apart. Changes nothing.

    other: a Q/DQ model (.onnx) by any quantizer, an encodings file, or a sim. `state` is 'same' (scales within 1e-6),
    'differs', 'only here', 'only there' (no tensor of the sim is meant: `note` gives the nearest names), or 'not
    comparable' (`note` says why). scale_difference: the largest of |other - scale| / scale. Zero points are counted
    from the smallest integer of their type. Of many channels, scale and zero point are those where they differ most.
    An ONNX file has types of 4, 8 and 16 bits: a grid of 6 bits is the same in one of 8.
    """
    file = _file_of(sim, other)
    matched = match(sim, file)
    rows: list[dict[str, Any]] = []
    seen: dict[Quantizer, Entry] = {}
    for entry in sorted(file.entries, key=lambda e: _is_guest(sim, matched.targets.get(e.label))):
        target = matched.targets.get(entry.label)
        if target is None or target.part == "bias":
            continue  # the grid of a bias follows from input and weight
        quantizer = _quantizer(sim, target)
        if quantizer is None:
            rows.append(_row(str(target), entry.label, ONLY_THERE, None, _alone(entry), "it is float here."))
        elif quantizer not in seen:
            seen[quantizer] = entry
            guest = f"there it is the grid of {target.layer!r}." if _is_guest(sim, target) else ""
            rows.append(_compared(_name(quantizer), entry, quantizer, guest, in_types=file.version == "onnx"))
        elif not same_grid(entry, seen[quantizer]):
            note = f"here it lies on the grid of {quantizer.name!r}."
            rows.append(_row(str(target), entry.label, ONLY_THERE, None, _alone(entry), note))
    for quantizer in (q for q in sim.quantizers.values() if isinstance(q, Quantizer)):
        if quantizer not in seen and quantizer.enabled:
            rows.append(_row(_name(quantizer), "", ONLY_HERE, quantizer.encoding, None, ""))
    for entry in file.entries:
        if entry.label in matched.unmatched and entry.bits != 32:
            note = f"no tensor of that name. {matched.unmatched[entry.label]}"
            rows.append(_row("", entry.label, ONLY_THERE, None, _alone(entry), note))
    whole = ("bits", "other_bits", "zero_point", "other_zero_point", "zero_point_difference")
    return pd.DataFrame(rows, columns=[*_COLUMNS, *_MORE]).astype(dict.fromkeys(whole, "Int64"))


def _file_of(sim: QuantSim, other: Any) -> EncodingsFile:
    """The other's entries; a tensor of an ONNX file that goes by several names has the one that the sim knows."""
    if isinstance(other, QuantSim):
        found = encodings_of(other)
        return EncodingsFile("sim", (*found.parameters, *found.activations), in_order=True)
    if not isinstance(other, (str, os.PathLike)):
        raise InputError(
            f"compare_encodings takes a path (.onnx or .encodings) or a QuantSim; got {type(other).__name__}."
        )
    if Path(other).suffix != ".onnx":
        return read(other)
    finder = Finder(sim, {})
    entries: dict[str, Entry] = {}
    for named in read_qdq(other):
        known = next((name for name in named.names if finder.of_tensor(name) is not None), named.plain)
        entries.setdefault(known, replace(named.entry, name=known))
    return EncodingsFile("onnx", tuple(entries.values()), in_order=False)


def _quantizer(sim: QuantSim, target: Target) -> Quantizer | None:
    entry = sim.placed[target.layer]
    return entry.weight if target.part == "weight" else entry.output


def _name(quantizer: Quantizer) -> str:
    return str(Target(quantizer.name, "weight" if isinstance(quantizer, WeightQuantizer) else "output"))


def _is_guest(sim: QuantSim, target: Target | None) -> bool:
    """Whether the tensor lies on the grid of another: a layer of a fused group, or one that inherits."""
    if target is None or target.part != "output":
        return False
    quantizer = _quantizer(sim, target)
    return quantizer is not None and quantizer.name != target.layer


def _compared(name: str, entry: Entry, quantizer: Quantizer, note: str, *, in_types: bool) -> dict[str, Any]:
    """`in_types`: the entry tells the width of the integers that are stored, which may be more than the grid's."""
    ours = quantizer.encoding if quantizer.enabled else None
    if entry.bits is None:
        state = SAME if ours is None else ONLY_HERE
        return _row(name, entry.label, state, ours, None, "it is float there.")
    if ours is None:
        return _row(name, entry.label, ONLY_THERE, None, _alone(entry), "its quantizer is off, or not calibrated.")
    try:
        theirs, _ = encoding_of(entry, quantizer)
        row = _row(name, entry.label, None, ours, theirs, note)
    except InputError as error:
        return _row(name, entry.label, INCOMPARABLE, ours, _alone(entry), str(error))
    is_stored_wider = in_types and ours.bits < theirs.bits == IntegerType.holding(ours).bits
    if is_stored_wider and row["scale_difference"] <= _EQUAL and row["zero_point_difference"] == 0:
        row |= {"state": SAME, "note": f"{note} It is stored in {theirs.bits} bits.".strip()}
    return row


def _alone(entry: Entry) -> Encoding | None:
    """The entry's grid as numbers in a row, where no tensor of the sim says which axis they lie on."""
    if entry.bits is None or entry.scale is None or entry.offset is None:
        return None
    return Encoding(entry.scale.reshape(-1), -entry.offset.reshape(-1), 0, (1 << entry.bits) - 1, 0)


def _row(
    name: str, other: str, state: str | None, ours: Encoding | None, theirs: Encoding | None, note: str
) -> dict[str, Any]:
    """`state`: None where both grids are there, to be compared."""
    row: dict[str, Any] = {"tensor": name, "other": other, "state": state, "note": note}
    figures = {"": _figures(ours), "other_": _figures(theirs)}
    place: dict[str, int] = dict.fromkeys(figures, 0)
    if state is None:
        assert ours is not None and theirs is not None  # noqa: PT018
        (scale, zero), (other_scale, other_zero) = figures.values()
        scale, other_scale = torch.broadcast_tensors(*_aligned(scale, other_scale))
        zero, other_zero = torch.broadcast_tensors(*_aligned(zero, other_zero))
        figures = {"": (scale, zero), "other_": (other_scale, other_zero)}
        gap, zero_gap = ((other_scale - scale).abs() / scale).reshape(-1), (other_zero - zero).abs().reshape(-1)
        row |= {"scale_difference": float(gap.max()), "zero_point_difference": int(zero_gap.max())}
        equal = row["scale_difference"] <= _EQUAL and row["zero_point_difference"] == 0 and ours.bits == theirs.bits
        row["state"] = SAME if equal else DIFFERS
        place = dict.fromkeys(place, int((gap + zero_gap).argmax()))
    for prefix, encoding in (("", ours), ("other_", theirs)):
        if encoding is not None:
            scales, zeros = (values.reshape(-1) for values in figures[prefix])
            row |= {
                f"{prefix}bits": encoding.bits,
                f"{prefix}scale": float(scales[place[prefix]]),
                f"{prefix}zero_point": int(zeros[place[prefix]]),
            }
    return row


def _figures(encoding: Encoding | None) -> tuple[Tensor, Tensor]:
    """Scales, and zero points counted from the smallest integer of their type."""
    if encoding is None:
        return torch.zeros(1), torch.zeros(1)
    zero_point = shifted_to_unsigned(encoding.zero_point, IntegerType.holding(encoding))
    return encoding.scale.detach().cpu(), zero_point.detach().cpu()


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [], [C] and [C, blocks], axes added behind so that they broadcast."""
    rank = max(a.dim(), b.dim())
    return tuple(v.reshape((*v.shape, *[1] * (rank - v.dim()))) for v in (a, b))
