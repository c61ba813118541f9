"""The simulation: placement, presets, QuantSim, calibration, evaluation, snapshots and files."""

from qlab.sim import presets
from qlab.sim.batches import Batches, labels_of
from qlab.sim.evaluate import SQNR, Accuracy, Agreement, Evaluation, Measurement, PerSample, Score, evaluation_of
from qlab.sim.files import load
from qlab.sim.placement import Placed, Role
from qlab.sim.presets import Preset
from qlab.sim.quant_sim import QuantSim
from qlab.sim.quantized_layer import QuantizedLayer
from qlab.sim.snapshot import Snapshot

__all__ = [
    "SQNR",
    "Accuracy",
    "Agreement",
    "Batches",
    "Evaluation",
    "Measurement",
    "PerSample",
    "Placed",
    "Preset",
    "QuantSim",
    "QuantizedLayer",
    "Role",
    "Score",
    "Snapshot",
    "evaluation_of",
    "labels_of",
    "load",
    "presets",
]
