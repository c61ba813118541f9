"""Figures of quantized models: DataFrames in, Bokeh figures out, one theme; knows pandas and Bokeh, nothing of qlab.

Each function builds a `Plot`: the last line of a cell shows it, `.save("x.html")` writes a page that opens offline,
`.update(frame, ...)` changes it in place, `.figure` is the Bokeh figure.
"""

try:
    import bokeh  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError('figures need Bokeh: pip install "qlab[lab]"') from error

from qlab.plots.columns import WrongColumns
from qlab.plots.comparison import ComparisonFigure, comparison
from qlab.plots.decision_tree import DecisionTreeFigure, decision_tree
from qlab.plots.graph import GraphFigure, graph
from qlab.plots.heat_map import HeatMapFigure, heat_map
from qlab.plots.histogram import HistogramFigure, clipped_share, histogram
from qlab.plots.layered_layout import layered_layout
from qlab.plots.noise import NoiseFigure, noise
from qlab.plots.pareto import ParetoFigure, pareto
from qlab.plots.plot import Plot
from qlab.plots.ranges import RangesFigure, weight_ranges
from qlab.plots.relative_ranges import RelativeRangesFigure, relative_ranges
from qlab.plots.report import Code, Section, save_html
from qlab.plots.sensitivity import SensitivityFigure, sensitivity
from qlab.plots.training import RangeHistoryFigure, TrainingFigure, range_history, training

__all__ = [
    "Code",
    "ComparisonFigure",
    "DecisionTreeFigure",
    "GraphFigure",
    "HeatMapFigure",
    "HistogramFigure",
    "NoiseFigure",
    "ParetoFigure",
    "Plot",
    "RangeHistoryFigure",
    "RangesFigure",
    "RelativeRangesFigure",
    "Section",
    "SensitivityFigure",
    "TrainingFigure",
    "WrongColumns",
    "clipped_share",
    "comparison",
    "decision_tree",
    "graph",
    "heat_map",
    "histogram",
    "layered_layout",
    "noise",
    "pareto",
    "range_history",
    "relative_ranges",
    "save_html",
    "sensitivity",
    "training",
    "weight_ranges",
]
