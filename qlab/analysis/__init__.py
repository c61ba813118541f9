"""Measurements of a simulation that leave it as it was."""

from qlab.analysis.analysis import Analysis
from qlab.analysis.bits import Bits
from qlab.analysis.distributions import channel_ranges, histogram_frame, histograms
from qlab.analysis.estimate import estimate_sensitivity
from qlab.analysis.layer_noise import layer_noise
from qlab.analysis.ledger import Row
from qlab.analysis.quant_analyzer import QuantAnalyzer
from qlab.analysis.units import Unit, units_of

__all__ = [
    "Analysis",
    "Bits",
    "QuantAnalyzer",
    "Row",
    "Unit",
    "channel_ranges",
    "estimate_sensitivity",
    "histogram_frame",
    "histograms",
    "layer_noise",
    "units_of",
]
