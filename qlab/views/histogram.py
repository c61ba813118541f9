"""The histogram of the selected layer: values, grid, what is clipped; the clip lines can be dragged."""

import math
from typing import Any

import ipywidgets
import pandas as pd

from qlab.errors import SpecError
from qlab.lab import Lab
from qlab.lab.histogram import HistogramData
from qlab.lab.rows import LayerRow
from qlab.plots import histogram as histogram_plot
from qlab.plots import weight_ranges
from qlab.views.bokeh_pane import BokehPane
from qlab.views.view import View, escape

PARTS = ("weight", "output")
ALL = "all channels"


class Histogram(View):
    """Weight or output of the first selected layer, or of `layer` when given; the ranges of its channels beside it.

    Dragging a clip line shows what that range would do; letting it go sets the range, as does typing it: one step of
    the history, and the range is frozen. A click on a channel shows that channel alone.
    """

    def __init__(self, lab: Lab, layer: str | None = None, part: str = "weight") -> None:
        super().__init__(lab)
        self._lab = lab
        self.layer = layer or (lab.selected[0] if lab.selected else self._first())
        self.channel: int | None = None
        self._wish = part if part in PARTS else "weight"  # what the person looks at, where a layer has it
        self._data: HistogramData | None = None
        self._dragged_to: tuple[float, float] | None = None
        self._is_drawing = False
        self._build_controls()
        self._values = histogram_plot(pd.DataFrame({"left": [], "right": [], "count": []}))
        self._channels = weight_ranges(pd.DataFrame({"channel": [], "min": [], "max": []}))
        self._values.figure.height, self._channels.figure.height = 210, 160
        self._values.figure.title.visible = False  # the caption says it; a still picture has it
        self._channels.title_letters = 30
        self._channels.figure.title.text_font_size = "8pt"
        self.values = BokehPane(self._values.figure, fallback=self._values.to_svg)
        self.channels = BokehPane(self._channels.figure, fallback=self._channels.to_svg)
        self.values.layout.flex, self.values.layout.min_width = "3 1 380px", "0"
        self.channels.layout.flex, self.channels.layout.min_width = "1 1 220px", "0"
        for edge in ("left", "right"):
            self._values.clip.on_change(edge, self.guarded(self._dragged))
        self.values.on_release(self.guarded(self._released))
        self._channels.now.selected.on_change("indices", self.guarded(self._channel_clicked))
        self.listen(lab.events.edited, self._edited)
        if layer is None:
            self.listen(lab.events.selected, self._selected)
        bar = ipywidgets.HBox(
            [self._part, self._channel, self._log, self._curve, self._low, self._high, self._set, self._free],
            layout=ipywidgets.Layout(align_items="center", flex_flow="row wrap"),
        )
        panes = ipywidgets.HBox([self.values, self.channels], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.display(self._caption, bar, panes)
        self.redraw_soon()

    @property
    def part(self) -> str:
        """'weight' or 'output'."""
        return self._part.value

    @part.setter
    def part(self, part: str) -> None:
        self._part.value = part

    def show_channel(self, channel: int | None) -> None:
        """Shows one channel alone, or all; raises SpecError where channels were not kept apart."""
        self.channel = channel
        try:
            self.redraw_soon()
        except SpecError:
            self.channel = None
            self.redraw_soon()
            raise

    def preview(self, low: float, high: float) -> HistogramData:
        """Shows what the range (low, high) would do, without setting it."""
        low, high = self._fitted(low, high)
        data = self._lab.histogram(self.layer, self.part, channel=self.channel, bounds=(low, high))
        with self.values.batch():
            self._values.update(data.bins, levels=data.levels, error=self._error(), name=self._name)
            self._tell(data, self._lab.layer_row(self.layer), "preview")
        return data

    def set_range(self, low: float, high: float) -> None:
        """Sets the range of the tensor, or of the channel shown, and freezes it: one step of the history."""
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"a range goes from a lower to a higher number; got {low:g} to {high:g}.")
        low, high = self._fitted(low, high)
        frame = None if self._data is None else self._data.channels
        if self.channel is None or frame is None or not self._is_per_channel:
            self._lab.set_range(self.layer, self.part, low, high)
            return
        lows, highs = list(frame["low"]), list(frame["high"])
        lows[self.channel], highs[self.channel] = low, high
        self._lab.set_range(self.layer, self.part, lows, highs)

    def redraw(self) -> None:
        """Shows the layer as it is now."""
        row = self._lab.layer_row(self.layer)
        present = {"weight": row.weight_bits is not None, "output": row.output_bits is not None}
        if not any(present.values()):
            self._caption.value = f"<b>{escape(self.layer)}</b>: no quantizer; {escape(row.reason)}"
            self._data = None
            return
        self._is_drawing = True
        self._part.value = self._wish if present[self._wish] else next(part for part in PARTS if present[part])
        self._is_drawing = False
        data = self._lab.histogram(self.layer, self.part)
        if self.channel is not None:
            if self.channel < len(data.channels):
                data = self._lab.histogram(self.layer, self.part, channel=self.channel)
            else:
                self.channel = None
        self._data = data
        self._is_drawing = True
        try:
            self._draw(data, row)
        finally:
            self._is_drawing = False

    def summary(self) -> str:
        """One line, the same on every run."""
        return f"Histogram({self.layer!r}, {self.part})"

    def to_html(self) -> str:
        """The figure as a still picture."""
        return f"{self._caption.value}{self.values.to_html()}"

    @property
    def _name(self) -> str:
        return f"{self.layer} {self.part}" + ("" if self.channel is None else f" channel {self.channel}")

    @property
    def _is_per_channel(self) -> bool:
        frame = None if self._data is None else self._data.channels
        row = self._lab.layer_row(self.layer)
        granularity = row.weight_granularity if self.part == "weight" else row.output_granularity
        return granularity == "per_channel" and frame is not None and len(frame) > 1

    @property
    def can_set_range(self) -> bool:
        """Whether what is shown has one range: a tensor, or one channel of several ranges."""
        row = self._lab.layer_row(self.layer)
        granularity = row.weight_granularity if self.part == "weight" else row.output_granularity
        if self._data is None or self._data.low is None or not self._data.enabled:
            return False
        return granularity == "per_tensor" or (granularity == "per_channel" and self.channel is not None)

    def _build_controls(self) -> None:
        self._part = ipywidgets.RadioButtons(options=PARTS, value=self._wish)
        self._part.orientation, self._part.layout.width = "horizontal", "auto"
        self._channel = ipywidgets.Dropdown(options=[(ALL, -1)], tooltip="show one channel alone")
        self._channel.layout.width = "112px"
        self._log = ipywidgets.Checkbox(value=False, description="log", indent=False)
        self._curve = ipywidgets.Checkbox(value=False, description="error curve", indent=False)
        self._low = ipywidgets.FloatText(description="range", tooltip="lower end of the range")
        self._high = ipywidgets.FloatText(description="to", tooltip="upper end of the range")
        self._set = ipywidgets.Button(description="Set", tooltip="set this range and keep it", icon="lock")
        self._free = ipywidgets.Button(
            description="By rule", tooltip="let the rule find the range again", icon="unlock"
        )
        self._log.layout.width, self._curve.layout.width = "52px", "94px"
        self._low.style.description_width, self._low.layout.width = "38px", "124px"
        self._high.style.description_width, self._high.layout.width = "16px", "102px"
        self._set.layout.width, self._free.layout.width = "62px", "84px"
        self._caption = ipywidgets.HTML()
        self._part.observe(self.guarded(self._part_chosen), "value")
        self._channel.observe(self.guarded(self._channel_chosen), "value")
        self._log.observe(self.guarded(lambda change: self._set_log(change["new"])), "value")
        self._curve.observe(self.guarded(lambda _: self.redraw_soon()), "value")
        self._set.on_click(self.guarded(lambda _: self.set_range(self._low.value, self._high.value)))
        self._free.on_click(self.guarded(lambda _: self._lab.set(self.layer, self.part, frozen=False)))

    def _draw(self, data: HistogramData, row: LayerRow) -> None:
        clip = None if data.low is None or data.high is None else (data.low, data.high)
        with self.values.batch():
            self._values.update(data.bins, levels=data.levels, clip=clip, error=self._error(), name=self._name)
            self._values.clip.editable = self.can_set_range
            self._tell(data, row)
        with self.channels.batch():
            ranges = data.channels[["channel", "min", "max"]]
            self._channels.update(ranges)
            shown = [] if self.channel is None else [self._bar_of(self.channel)]
            if self._channels.now.selected.indices != shown:
                self._channels.now.selected.indices = shown
        self.channels.label = f"{self.layer} {self.part}: {self._channels.headline}"
        self.channels.layout.display = None if len(data.channels) > 1 else "none"
        count = len(data.channels)
        if len(self._channel.options) != max(count, 1) + (count > 1):
            numbers = [(f"channel {i}", i) for i in range(count)] if count > 1 else []
            self._channel.options = [(ALL, -1), *numbers]
        self._channel.value = -1 if self.channel is None else self.channel
        self._low.value, self._high.value = (float(f"{x:.4g}") for x in clip) if clip else (0.0, 0.0)
        for control in (self._low, self._high, self._set):
            control.disabled = not self.can_set_range
        self._free.disabled = not data.frozen

    def _error(self) -> pd.DataFrame | None:
        return self._lab.error_curve(self.layer, self.part) if self._curve.value else None

    def _bar_of(self, channel: int) -> int:
        data = self._channels.now.data
        bars = zip(data["channel"], data["last"], strict=True)
        return next(i for i, (first, last) in enumerate(bars) if first <= channel <= last)

    def _tell(self, data: HistogramData, row: LayerRow, state: str = "") -> None:
        """The same sentence above the picture, in it, and for who cannot see it."""
        bits = row.weight_bits if self.part == "weight" else row.output_bits
        notes = [f"{bits} bits", f"SQNR {data.sqnr:.1f} dB", f"{data.clipped_share:.2%} clipped"]
        if self.part == "output" and row.grid != self.layer:
            notes.insert(1, f"rounded at {row.grid}")
        if not data.enabled:
            notes.append("switched off")
        if data.frozen and not state:
            notes.append("range set by hand")
        if state:
            notes.append(f"{state}: {data.low:.4g} to {data.high:.4g}")
        told = ", ".join(notes)
        if len(data.bins):
            self._values.say(f"{self._name}: {told}")
        self.values.label = self._values.headline
        self._caption.value = f"<span role='status'><b>{escape(self._name)}</b>: {escape(told)}</span>"

    def _set_log(self, is_log: bool) -> None:
        with self.values.batch():
            self._values.set_counts("log" if is_log else "linear")

    def _dragged(self, _attr: str, _old: float, _new: float) -> None:
        if not self._is_drawing and self.can_set_range:
            low, high = sorted((float(self._values.clip.left), float(self._values.clip.right)))
            self._dragged_to = low, high
            self.preview(low, high)

    def _released(self) -> None:
        reached, self._dragged_to = self._dragged_to, None
        if reached is not None:
            self.set_range(*reached)

    def _fitted(self, low: float, high: float) -> tuple[float, float]:
        """The range as the scheme has it: of a symmetric grid, the edge that was moved moves the other one too."""
        data, row = self._data, self._lab.layer_row(self.layer)
        scheme = row.weight_scheme if self.part == "weight" else row.output_scheme
        if data is None or data.low is None or data.high is None or scheme == "asymmetric":
            return low, high
        bound = abs(low if abs(low - data.low) > abs(high - data.high) else high)
        return (0.0 if scheme == "unsigned_symmetric" else -bound), bound

    def _part_chosen(self, change: Any) -> None:
        if not self._is_drawing:
            self._wish = change["new"]
            self.show_channel(None)

    def _channel_clicked(self, _attr: str, _old: list[int], new: list[int]) -> None:
        if not self._is_drawing:
            channels = self._channels.channels_at(new[:1])
            self.show_channel(channels[0] if channels else None)

    def _channel_chosen(self, change: Any) -> None:
        if not self._is_drawing:
            self.show_channel(None if change["new"] < 0 else change["new"])

    def _edited(self, names: tuple[str, ...]) -> None:
        if self.layer in names:
            self.redraw_soon()

    def _selected(self, names: tuple[str, ...]) -> None:
        if names and names[0] != self.layer:
            self.layer, self.channel = names[0], None
            self.redraw_soon()

    def _first(self) -> str:
        frame = self._lab.layers()
        weighted = frame.loc[frame["weight_bits"].notna(), "name"]
        return str(weighted.iloc[0] if len(weighted) else frame["name"].iloc[0])
