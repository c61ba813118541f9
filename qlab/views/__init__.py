"""What a person sees and touches in Jupyter; the only place that knows ipywidgets. Every view works on its own."""

from qlab.views.bokeh_pane import BokehPane
from qlab.views.dashboard import Dashboard
from qlab.views.histogram import Histogram
from qlab.views.job_panel import JobPanel
from qlab.views.layer_grid import Column, LayerGrid
from qlab.views.layer_table import LayerTable
from qlab.views.score import Score
from qlab.views.view import View

__all__ = [
    "BokehPane",
    "Column",
    "Dashboard",
    "Histogram",
    "JobPanel",
    "LayerGrid",
    "LayerTable",
    "Score",
    "View",
]
