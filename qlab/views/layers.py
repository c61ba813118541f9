"""The layers: the table, what acts on several rows at once, and the histogram of the selected one."""

import ipywidgets

from qlab.lab import Lab
from qlab.views.histogram import Histogram
from qlab.views.layer_table import LayerTable
from qlab.views.selection_bar import SelectionBar
from qlab.views.tabs import tab
from qlab.views.view import View


@tab("Layers", place=10)
class Layers(View):
    """Table and histogram side by side where there is room, else one above the other."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.selection = SelectionBar(lab)
        self.table = LayerTable(lab, height_px=215)
        self.histogram = Histogram(lab)
        self.table.layout.flex, self.table.layout.min_width = "3 1 640px", "0"
        self.histogram.layout.flex, self.histogram.layout.min_width = "2 1 400px", "0"
        main = ipywidgets.HBox(
            [self.table, self.histogram],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="8px 16px"),
        )
        self.display(self.selection, main)
        self.add_class("qlab-layers")

    def to_html(self) -> str:
        """The table and the histogram without a kernel."""
        return self.table.to_html() + self.histogram.to_html()
