"""A workbench for quantizing PyTorch models inside Jupyter.

`import qlab` loads the engine; everything above it (techniques, analysis, export, lab, views, plots) is imported when
first used, so that the engine works, and starts fast, where Jupyter and Bokeh are not installed.
"""

from importlib import import_module
from typing import Any

from qlab import errors
from qlab.graph import capture
from qlab.mapped import map_weights
from qlab.progress import Bar, Cancellable, Progress, Silent
from qlab.quantization import Encoding, Quantizer, QuantSpec, Scheme, Statistics, per_block
from qlab.sim import (
    SQNR,
    Accuracy,
    Agreement,
    Evaluation,
    Measurement,
    Preset,
    QuantSim,
    Score,
    Snapshot,
    load,
    presets,
)

__version__ = "0.1.0"

# Public name to the module that holds it; None for the module itself.
_LATER: dict[str, tuple[str, str | None]] = {
    "AdaRound": ("qlab.techniques", "AdaRound"),
    "AutoQuant": ("qlab.techniques", "AutoQuant"),
    "BatchNormFolding": ("qlab.techniques", "BatchNormFolding"),
    "BatchNormReestimation": ("qlab.techniques", "BatchNormReestimation"),
    "BiasCorrection": ("qlab.techniques", "BiasCorrection"),
    "CrossLayerEqualization": ("qlab.techniques", "CrossLayerEqualization"),
    "GPTQ": ("qlab.techniques", "GPTQ"),
    "Lab": ("qlab.lab", "Lab"),
    "guidebook": ("qlab.lab.guidebook", "guidebook"),
    "MixedPrecision": ("qlab.techniques", "MixedPrecision"),
    "QAT": ("qlab.techniques", "QAT"),
    "QuantAnalyzer": ("qlab.analysis", "QuantAnalyzer"),
    "SequentialMSE": ("qlab.techniques", "SequentialMSE"),
    "Steering": ("qlab.techniques", "Steering"),
    "TrainingControl": ("qlab.techniques", "TrainingControl"),
    "compare_encodings": ("qlab.export.compare_encodings", "compare_encodings"),
    "on_target": ("qlab.export.on_target", "on_target"),
    "views": ("qlab.views", None),
    "plots": ("qlab.plots", None),
    "examples": ("qlab.examples", None),
    "prepare": ("qlab.graph.prepare", "prepare"),
    "validate": ("qlab.sim.validate", "validate"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'qlab' has no attribute {name!r}")
    module, attribute = _LATER[name]
    value = import_module(module) if attribute is None else getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "SQNR",
    "Accuracy",
    "Agreement",
    "Bar",
    "Cancellable",
    "Encoding",
    "Evaluation",
    "Measurement",
    "Preset",
    "Progress",
    "QuantSim",
    "QuantSpec",
    "Quantizer",
    "Scheme",
    "Score",
    "Silent",
    "Snapshot",
    "Statistics",
    "capture",
    "errors",
    "load",
    "map_weights",
    "per_block",
    "presets",
]
