"""The captured model: layers, how they are found, and how they are run again in part."""

from qlab.graph.capture import capture
from qlab.graph.example import example_arguments
from qlab.graph.kinds import KNOWN_RANGES, SAME_GRID, WEIGHTED
from qlab.graph.layer_graph import FoldedNorm, Layer, LayerGraph, call_layer, fill
from qlab.graph.linear_form import LinearForm, linear_form
from qlab.graph.module_graph import ModuleGraph, captured
from qlab.graph.origins import Origin, Source, is_mask_value, origins
from qlab.graph.replay import Replay

__all__ = [
    "KNOWN_RANGES",
    "SAME_GRID",
    "WEIGHTED",
    "FoldedNorm",
    "Layer",
    "LayerGraph",
    "LinearForm",
    "ModuleGraph",
    "Origin",
    "Replay",
    "Source",
    "call_layer",
    "capture",
    "captured",
    "example_arguments",
    "fill",
    "is_mask_value",
    "linear_form",
    "origins",
]
