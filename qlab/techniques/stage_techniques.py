"""Techniques as AutoQuant uses them: made from a name, told apart by settings, asked whether they did anything."""

import math
from dataclasses import fields

from qlab.quantization import WeightQuantizer
from qlab.sim import QuantSim
from qlab.techniques.batch_norm_folding import BatchNormFolding
from qlab.techniques.cross_layer_equalization import CrossLayerEqualization
from qlab.techniques.mixed_precision import MixedPrecision
from qlab.techniques.qat import QAT
from qlab.techniques.stage_store import StageStore
from qlab.techniques.technique import Report, Technique

_FOLDERS = ("cache_dir", "checkpoint_dir")
_NOTHING_DONE = {BatchNormFolding: "folded", CrossLayerEqualization: "pairs"}  # the value that is 0 or missing then


def did_nothing(technique: Technique, report: Report) -> bool:
    """Whether there was nothing for a technique to change."""
    return any(isinstance(technique, kind) and not report.values.get(value) for kind, value in _NOTHING_DONE.items())


def named(kind: type[Technique], sim: QuantSim, store: StageStore) -> Technique:
    """A technique that was only named: it keeps what it can resume from in the store, mixed precision the size."""
    if not issubclass(kind, MixedPrecision):
        folders = [f.name for f in fields(kind) if f.name in _FOLDERS] if store.folder is not None else []
        return kind(**{name: str(store.folder) for name in folders})
    weights = [q for q in sim.quantizers.values() if isinstance(q, WeightQuantizer) and q.enabled]
    numbers = sum(q.weight.numel() for q in weights)
    if not numbers:
        return kind()
    mean = sum(q.bits * q.weight.numel() for q in weights) / numbers
    near = range(max(2, math.floor(mean) - 2), min(16, math.ceil(mean) + 4) + 1)
    return kind(bits=tuple(near), budget=mean)


def identity(technique: Technique) -> str:
    """The settings of a technique that its result depends on."""
    told = {f.name: getattr(technique, f.name) for f in fields(technique) if f.name not in (*_FOLDERS, "executor")}
    return f"{name_of(technique)} {told}"


def is_rounding(technique: Technique) -> bool:
    """Whether a technique is tried on the finalists: all but those with a place of their own."""
    return not isinstance(technique, (BatchNormFolding, CrossLayerEqualization, MixedPrecision, QAT))


def name_of(technique: Technique) -> str:
    """What the table of stages calls it."""
    return type(technique).__name__
