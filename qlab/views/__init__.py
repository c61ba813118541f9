"""What a person sees and touches in Jupyter; the only place that knows ipywidgets. Every view works on its own.

A new view is one file, and one line here; `@tab(...)` on its class makes it a tab of the dashboard.
"""

try:
    import anywidget  # noqa: F401
    import bokeh  # noqa: F401
    import ipywidgets  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'the dashboard and its views need ipywidgets, anywidget and Bokeh: pip install "qlab[lab]"'
    ) from error

from qlab.views.bokeh_pane import BokehPane
from qlab.views.channels import Channels
from qlab.views.compare import Compare
from qlab.views.dashboard import Dashboard
from qlab.views.diagnosis import Diagnosis
from qlab.views.export_panel import Export
from qlab.views.findings import Findings
from qlab.views.graph_view import GraphView
from qlab.views.guidebook import Guidebook
from qlab.views.histogram import Histogram
from qlab.views.history import History, Past, Script
from qlab.views.job_panel import JobPanel
from qlab.views.layer_grid import Column, LayerGrid
from qlab.views.layer_table import LayerTable
from qlab.views.layers import Layers
from qlab.views.pareto import Pareto
from qlab.views.score import Score
from qlab.views.selection_bar import SelectionBar
from qlab.views.sensitivity import Sensitivity
from qlab.views.settings_form import SettingsForm
from qlab.views.stages import Stages
from qlab.views.tabs import TABS, tab
from qlab.views.technique_form import TechniqueForm
from qlab.views.training import Training
from qlab.views.view import View

__all__ = [
    "TABS",
    "BokehPane",
    "Channels",
    "Column",
    "Compare",
    "Dashboard",
    "Diagnosis",
    "Export",
    "Findings",
    "GraphView",
    "Guidebook",
    "Histogram",
    "History",
    "JobPanel",
    "LayerGrid",
    "LayerTable",
    "Layers",
    "Pareto",
    "Past",
    "Score",
    "Script",
    "SelectionBar",
    "Sensitivity",
    "SettingsForm",
    "Stages",
    "TechniqueForm",
    "Training",
    "View",
    "tab",
]
