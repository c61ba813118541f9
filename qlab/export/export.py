"""A sim into files that others read: ONNX with Q/DQ and in float, encodings, weights, and a PyTorch program.

All files of one export are written beside their places first and moved there together at the end, so that an error
leaves the earlier ones, and no new ones.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlab.errors import InputError, NotCalibrated
from qlab.export.encodings_write import compose
from qlab.export.tensors import governed, updated_values
from qlab.progress import Progress, Silent
from qlab.quantization import Quantizer
from qlab.sim import QuantSim

if TYPE_CHECKING:
    from onnx import ModelProto

FORMATS = ("onnx", "encodings", "safetensors", "program")
WEIGHTS = ("float", "integer")
SUFFIXES = {
    "onnx": (".onnx", ".float.onnx"),
    "encodings": (".encodings",),
    "safetensors": (".safetensors",),
    "program": (".pt2",),
}
_PROTOBUF_LIMIT = 1_900_000_000  # a protobuf message holds 2 GiB; larger models keep their tensors in a file beside


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote, and their sizes in bytes."""

    files: dict[Path, int]

    def __repr__(self) -> str:
        return "\n".join(f"{path}  {size / 1024:,.0f} KiB" for path, size in self.files.items())


def export(
    sim: QuantSim,
    path: str | os.PathLike[str],
    encodings: str = "1.0.0",
    weights: str = "float",
    formats: Sequence[str] = ("onnx", "encodings", "safetensors"),
    progress: Progress | None = None,
) -> Exported:
    """Writes files beside `path`: see QuantSim.export."""
    _check(sim, weights, formats)
    progress, steps = progress or Silent(), len(formats) + 1
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for number, form in enumerate(formats):
            progress.step(number, steps, f"writing {form}")
            if form == "onnx":
                _write_onnx(sim, folder / target.name, weights == "integer")
            elif form == "encodings":
                (folder / f"{target.name}.encodings").write_text(compose(sim, encodings), encoding="utf-8")
            elif form == "safetensors":
                _write_weights(sim, folder / f"{target.name}.safetensors")
            else:
                _write_program(sim, folder / f"{target.name}.pt2")
        progress.step(steps - 1, steps, "moving the files into place")
        written = sorted(folder.iterdir())
        _move(written, target.parent)
        return Exported({target.parent / file.name: (target.parent / file.name).stat().st_size for file in written})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def updated_weights(sim: QuantSim) -> dict[str, Tensor]:
    """The model's state under the user's own names, with the weights and biases that a target should quantize."""
    state = {name: value.detach() for name, value in sim.model.state_dict().items()}
    for name, value in updated_values(sim).items():
        state[name] = value.detach()
    return state


def _check(sim: QuantSim, weights: str, formats: Sequence[str]) -> None:
    if weights not in WEIGHTS:
        raise InputError(f"weights must be 'float' or 'integer'; got {weights!r}.")
    unknown = [form for form in formats if form not in FORMATS]
    if isinstance(formats, str) or unknown or not formats:
        raise InputError(f"formats must be some of {', '.join(map(repr, FORMATS))}; got {formats!r}.")
    missing = [q.name for q in sim.quantizers.values() if isinstance(q, Quantizer) and q.enabled and q.encoding is None]
    if missing:
        raise NotCalibrated(
            f"{len(missing)} quantizers have no encoding yet, the first is that of {missing[0]!r}. "
            "Run sim.calibrate(batches) before sim.export(path)."
        )
    for layer, _, _ in governed(sim):
        if layer.dtype != torch.float32:
            raise InputError(f"layer {layer.name!r} computes in {layer.dtype}; export a float32 model: model.float().")


def _write_onnx(sim: QuantSim, path: Path, integer_weights: bool) -> None:
    from onnx import checker

    from qlab.export.float_model import trace
    from qlab.export.onnx_model import float_model, needed_opset, quantized_model

    marked = trace(sim, needed_opset(sim))
    for name, model in (
        (f"{path.name}.onnx", quantized_model(sim, marked, integer_weights)),
        (f"{path.name}.float.onnx", float_model(marked)),
    ):
        _save(model, path.with_name(name))
        checker.check_model(str(path.with_name(name)), full_check=True)


def _save(model: "ModelProto", path: Path) -> None:
    import onnx

    beside = sum(len(initializer.raw_data) for initializer in model.graph.initializer) > _PROTOBUF_LIMIT
    onnx.save_model(model, str(path), save_as_external_data=beside, location=f"{path.name}.data")


def _write_weights(sim: QuantSim, path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, value in updated_weights(sim).items():
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and key in seen:
            value = value.clone()  # a shared parameter is stored under each of its names, so that the file is complete
        seen.add(key)
        tensors[name] = value.cpu().contiguous()
    save_file(tensors, path)


def _write_program(sim: QuantSim, path: Path) -> None:
    from qlab.export.program import program

    torch.export.save(program(sim), path)


def _move(written: list[Path], folder: Path) -> None:
    """Puts the files into their places; where one cannot be, all places are as they were."""
    kept: list[tuple[Path, Path | None]] = []
    try:
        for file in written:
            place, old = folder / file.name, None
            if place.exists():
                old = file.with_name(f"{file.name}.before")
                os.replace(place, old)
            kept.append((place, old))
            os.replace(file, place)
    except BaseException:
        for place, old in kept:
            if old is not None:
                os.replace(old, place)
            else:
                place.unlink(missing_ok=True)
        raise
