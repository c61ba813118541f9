"""Which integers to round a weight to, once second moments say what each choice costs: searches on plain tensors."""

from qlab.quantization.rounding.adam import Adam
from qlab.quantization.rounding.descent import coordinate_descent
from qlab.quantization.rounding.enumeration import MAX_ENUMERATED, enumerate_roundings
from qlab.quantization.rounding.nearest_plane import Factor, factor_metric, nearest_plane
from qlab.quantization.rounding.problem import RoundingProblem
from qlab.quantization.rounding.relaxation import relax
from qlab.quantization.rounding.scales import best_factors, scale_errors, search_scale
from qlab.quantization.rounding.soft import SoftRounding

__all__ = [
    "MAX_ENUMERATED",
    "Adam",
    "Factor",
    "RoundingProblem",
    "SoftRounding",
    "best_factors",
    "coordinate_descent",
    "enumerate_roundings",
    "factor_metric",
    "nearest_plane",
    "relax",
    "scale_errors",
    "search_scale",
]
