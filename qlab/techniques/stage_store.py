"""Finished stages on disk, by content: a stage belongs to what it started from, its settings, the data and the score.

A file is used only when its checksum is right, so a damaged one costs the time to compute it again and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.errors import InputError
from qlab.quantization import Quantizer, WeightQuantizer
from qlab.sim import QuantSim
from qlab.sim.evaluate import Evaluation, Score
from qlab.sim.files import load_state

_FORMAT = "qlab-stages-1"


class StageStore:
    """A folder of stages; with folder None it keeps nothing. Raises InputError where the folder is not writable."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else require_writable(folder)

    def find(self, key: str, with_state: bool) -> dict[str, Any] | None:
        """What was kept for a stage, None where nothing usable is; `with_state` asks for the saved sim, too."""
        if self.folder is None:
            return None
        try:
            kept = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            found = kept["record"]
            if kept["format"] != _FORMAT or kept["checksum"] != _text_checksum(found):
                return None
            if with_state and kept["state"] != _file_checksum(self._state(key)):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found

    def keep(self, key: str, record: dict[str, Any], sim: QuantSim | None) -> None:
        """Writes a finished stage: the state of `sim` first, so that a record never stands without it."""
        if self.folder is None:
            return
        kept = {"format": _FORMAT, "record": record, "checksum": _text_checksum(record)}
        if sim is not None:
            sim.save(self._state(key))
            kept["state"] = _file_checksum(self._state(key))
        target = self.folder / f"{key}.json"
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            beside.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)

    def load(self, key: str, sim: QuantSim) -> None:
        """Changes `sim`, which is in the state that AutoQuant began with, to the stage's."""
        load_state(sim, self._state(key))

    def _state(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def key_of(*parts: str) -> str:
    """A short name for what `parts` say."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def fingerprint(sim: QuantSim, data: Iterable[Any], evaluation: Evaluation) -> str:
    """A checksum of where AutoQuant starts: weights, quantizers, all data and the score with its own."""
    digest = hashlib.sha256()
    for name, quantizer in sim.quantizers.items():
        assert isinstance(quantizer, Quantizer)
        digest.update(f"{name} {quantizer.spec} {quantizer.enabled} {quantizer.frozen}".encode())
        _add(digest, quantizer.rounding if isinstance(quantizer, WeightQuantizer) else None)
    digest.update(repr(sim.graph.edits).encode())
    _add(digest, [*sim.state_dict().items()])
    for batch in data:
        _add(digest, batch)
    digest.update(f"{type(evaluation).__name__} {evaluation.name}".encode())
    if isinstance(evaluation, Score):
        code = getattr(evaluation.function, "__code__", None)
        constants = [c for c in code.co_consts if isinstance(c, (int, float, str))] if code is not None else []
        digest.update(b"" if code is None else code.co_code + repr(constants).encode())
    for batch in evaluation.batches or ():
        _add(digest, batch)
    return digest.hexdigest()


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """The folder, made where it is missing; raises InputError, saying why, where nothing can be written into it."""
    path = Path(folder)
    probe = path / f".{os.getpid()}.part"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot write into {os.fspath(folder)!r}: {reason}. Choose a folder that is writable."
        ) from None
    return path


def _add(digest: Any, value: Any) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())


def _text_checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
