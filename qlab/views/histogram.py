"""The histogram of the selected layer: its values, the integer grid, what is clipped; it follows every edit."""

from typing import Any

import ipywidgets

from qlab.lab import Lab
from qlab.plots import histogram as histogram_plot
from qlab.plots import weight_ranges
from qlab.views.bokeh_pane import BokehPane
from qlab.views.view import View, escape

PARTS = ("weight", "output")


class Histogram(View):
    """Weight or output of the first selected layer, or of `layer` when given; the ranges of its channels below."""

    def __init__(self, lab: Lab, layer: str | None = None, part: str = "weight") -> None:
        super().__init__(lab)
        self._lab = lab
        self.layer = layer or (lab.selected[0] if lab.selected else self._first())
        self._part = ipywidgets.ToggleButtons(options=PARTS, value=self._possible(part))
        self._part.style.button_width = "70px"
        self._log = ipywidgets.Checkbox(value=False, description="log counts", indent=False)
        self._log.layout.width = "110px"
        self._caption = ipywidgets.HTML()
        self._values = histogram_plot(_nothing())
        self._channels = weight_ranges(_no_channels())
        self._values.figure.height, self._channels.figure.height = 260, 150
        self.values = BokehPane(self._values.figure, fallback=self._values.to_svg)
        self.channels = BokehPane(self._channels.figure, fallback=self._channels.to_svg)
        self._part.observe(self.guarded(lambda _: self.update()), "value")
        self._log.observe(self.guarded(lambda change: self._set_log(change["new"])), "value")
        self.listen(lab.events.edited, self._edited)
        if layer is None:
            self.listen(lab.events.selected, self._selected)
        bar = ipywidgets.HBox([self._part, self._log], layout=ipywidgets.Layout(align_items="center"))
        self.display(self._caption, bar, self.values, self.channels)
        self.update()

    @property
    def part(self) -> str:
        """'weight' or 'output'."""
        return self._part.value

    @part.setter
    def part(self, part: str) -> None:
        self._part.value = part

    def update(self) -> None:
        """Shows the layer as it is now."""
        row = self._lab.layer_row(self.layer)
        present = {"weight": row.weight_bits is not None, "output": row.output_bits is not None}
        if not present[self.part]:
            other = next((part for part in PARTS if present[part]), None)
            if other is None:
                self._caption.value = f"<b>{escape(self.layer)}</b>: no quantizer; {escape(row.reason)}"
                return
            self._part.value = other
            return
        data = self._lab.histogram(self.layer, self.part)
        clip = None if data.low is None or data.high is None else (data.low, data.high)
        with self.values.batch():
            self._values.update(data.bins, levels=data.levels, clip=clip, name=f"{self.layer} {self.part}")
            self._values.clip.editable = False
        self.values.label = self._values.headline
        with self.channels.batch():
            self._channels.update(data.channels[["channel", "min", "max"]], name=f"{self.layer} {self.part}")
        self.channels.label = self._channels.headline
        self._caption.value = self._sentence(data, row)

    def summary(self) -> str:
        """One line, the same on every run."""
        return f"Histogram({self.layer!r}, {self.part})"

    def to_html(self) -> str:
        """The figure as a still picture."""
        return f"{self._caption.value}{self.values.to_html()}"

    def _sentence(self, data: Any, row: Any) -> str:
        bits = row.weight_bits if self.part == "weight" else row.output_bits
        state = "" if data.enabled else ", switched off"
        state += ", range set by hand" if data.frozen else ""
        elsewhere = f", rounded at {escape(row.grid)}" if self.part == "output" and row.grid != self.layer else ""
        return (
            f"<b>{escape(self.layer)}</b> {self.part}: {bits} bits{elsewhere}, SQNR {data.sqnr:.1f} dB, "
            f"{data.clipped_share:.2%} clipped{state}"
        )

    def _set_log(self, is_log: bool) -> None:
        with self.values.batch():
            self._values.set_counts("log" if is_log else "linear")

    def _edited(self, names: tuple[str, ...]) -> None:
        if self.layer in names:
            self.update()

    def _selected(self, names: tuple[str, ...]) -> None:
        if names and names[0] != self.layer:
            self.layer = names[0]
            self.update()

    def _first(self) -> str:
        frame = self._lab.layers()
        weighted = frame.loc[frame["weight_bits"].notna(), "name"]
        return str(weighted.iloc[0] if len(weighted) else frame["name"].iloc[0])

    def _possible(self, part: str) -> str:
        return part if part in PARTS else "weight"


def _nothing() -> Any:
    import pandas as pd

    return pd.DataFrame({"left": [], "right": [], "count": []})


def _no_channels() -> Any:
    import pandas as pd

    return pd.DataFrame({"channel": [], "min": [], "max": []})
