"""Where a static picture's plotting area lies, and how data become pixels: a small share of BokehJS's layout."""

import math

import numpy as np
from bokeh.models import Axis, ColorBar, FixedTicker, Legend, PlainText, Range1d
from bokeh.models.text import BaseText
from bokeh.plotting import figure as BokehFigure
from numpy.typing import ArrayLike

from qlab.plots import theme


class Frame:
    """Where the plotting area lies in pixels, and the mapping from data to pixels."""

    def __init__(self, figure: BokehFigure):
        self.figure, self.height = figure, figure.height
        self.title = plain_text(figure.title.text).split("\n")
        self.legends = [item for item in figure.above if isinstance(item, Legend) and item.items]
        self.bars = [item for item in figure.right if isinstance(item, ColorBar) and item.visible]
        self.more_axes = [axis for axis in figure.yaxis[1:] if axis.visible]
        self.x_ticks, self.y_ticks = (
            ticks(axis, axis_range) if axis.visible else []
            for axis, axis_range in ((figure.xaxis[0], figure.x_range), (figure.yaxis[0], figure.y_range))
        )
        widest = max((len(words) for _, words in self.y_ticks), default=0)
        self.left = 16 + round(6.2 * widest) + (16 if figure.yaxis[0].axis_label else 0)
        self.right = theme.WIDTH - 14 - 56 * len(self.more_axes) - 64 * len(self.bars)
        self.top = 9 + 15 * len(self.title) + 20 * len(self.legends)
        self.bottom = self.height - (40 if self.x_ticks else 8)

    def x(self, values: ArrayLike) -> np.ndarray:
        """Pixels across."""
        return self.left + _share(values, self.figure.x_range) * (self.right - self.left)

    def y(self, values: ArrayLike, range_name: str = "default") -> np.ndarray:
        """Pixels down, on the axis of a named range."""
        axis_range = self.figure.extra_y_ranges.get(range_name, self.figure.y_range)
        return self.bottom - _share(values, axis_range) * (self.bottom - self.top)


def _share(values: ArrayLike, axis_range: Range1d) -> np.ndarray:
    start, end = axis_range.start, axis_range.end
    return np.clip((np.asarray(values, dtype=float) - start) / (end - start), -2, 3)


def ticks(axis: Axis, axis_range: Range1d) -> list[tuple[float, str]]:
    """Places on an axis with their labels: its own fixed ones, or about six round numbers."""
    low, high = sorted((axis_range.start, axis_range.end))
    if isinstance(axis.ticker, FixedTicker):
        fixed = [place for place in axis.ticker.ticks if low <= place <= high]
        return [(place, plain_text(axis.major_label_overrides.get(place, f"{place:g}"))) for place in fixed]
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= (high - low) / 6)
    places = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return [(float(place), f"{place:.6g}") for place in places]


def plain_text(words: str | BaseText) -> str:
    """The characters of a title or label, whether wrapped against typesetting or not."""
    return words.text if isinstance(words, PlainText) else str(getattr(words, "text", words))
