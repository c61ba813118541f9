"""One look for every figure: colours, fonts, sizes, and the CSS that lets figures follow light and dark.

Okabe-Ito colours (float blue, quantized vermillion), cividis for heat, and a second sign (shape, hatch or text) beside
every colour that carries meaning. Figures are transparent; BokehJS reads `--bk-*` variables when it paints, so a page
that sets them (the panes do, and a report by `STYLE`) restyles figures without touching them.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from bokeh.models import Axis, BasicTicker, ColorBar, FixedTicker, HoverTool, Legend, PlainText, Range1d
from bokeh.palettes import cividis
from bokeh.plotting import figure as BokehFigure

FLOAT = "#0072B2"
QUANTIZED = "#D55E00"
SKY = "#56B4E9"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
NEUTRAL = "#787878"  # at least 4:1 on white and on JupyterLab's dark #111111
LIGHT_INK = "#ffffff"
DARK_INK = "#111111"
SERIES = (QUANTIZED, FLOAT, PURPLE, ORANGE, SKY, NEUTRAL)
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")
HEAT = cividis(64)
FONT = "system-ui, sans-serif"
WIDTH = 720
HEIGHT = 300

STYLE = """
.qlab-plot {
  --bk-grid-line-color: var(--jp-border-color2, #e0e0e0);
  --bk-axis-line-color: var(--jp-ui-font-color2, #616161);
  --bk-major-tick-line-color: var(--jp-ui-font-color2, #616161);
  --bk-major-label-text-color: var(--jp-ui-font-color1, #212121);
  --bk-axis-label-text-color: var(--jp-ui-font-color1, #212121);
  --bk-title-text-color: var(--jp-ui-font-color1, #212121);
  --bk-text-color: var(--jp-ui-font-color1, #212121);
}
"""
_LEGEND_STYLE = ".bk-label { color: var(--jp-ui-font-color1, inherit) !important; }"


def new_figure(
    x_label: str, y_label: str, *, tools: str = "xpan,xwheel_zoom,reset,save", height: int = HEIGHT, **options: Any
) -> BokehFigure:
    """Make an empty figure in qlab's look, as wide as its container up to `WIDTH` pixels.

    Ranges are explicit (`Range1d`), never measured in the browser, so that Python, the browser and the static picture
    show the same and an update does not fight with a zoom.
    """
    options.setdefault("x_range", Range1d(0, 1))
    options.setdefault("y_range", Range1d(0, 1))
    figure = BokehFigure(
        height=height,
        width=WIDTH,
        max_width=WIDTH,
        sizing_mode="stretch_width",
        tools=tools,
        active_scroll=None,
        toolbar_location="right",
        x_axis_label=x_label,
        y_axis_label=y_label,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        css_classes=["qlab-plot"],
        css_variables={"--bk-outline-line-color": "transparent", "--bk-minor-tick-line-color": "transparent"},
        min_border_right=12,
        lod_threshold=None,
        **options,
    )
    figure.toolbar.logo = None
    figure.toolbar.autohide = True
    figure.title.text_font = FONT
    figure.title.text_font_size = "12px"
    figure.title.text_font_style = "bold"
    figure.title.text_color = NEUTRAL
    figure.grid.grid_line_alpha = 0.6
    for axis in figure.axis:
        style_axis(axis)
    return figure


def style_axis(axis: Axis) -> None:
    """Give an axis qlab's fonts and neutral ink (changes it in place)."""
    axis.axis_label_text_font = axis.major_label_text_font = FONT
    axis.axis_label_text_font_style = "normal"
    axis.axis_label_text_font_size = "12px"
    axis.major_label_text_font_size = "11px"
    axis.axis_line_color = axis.major_tick_line_color = NEUTRAL
    axis.major_label_text_color = axis.axis_label_text_color = NEUTRAL
    axis.minor_tick_line_color = None


def style_legend(legend: Legend, *, place: str = "center") -> None:
    """Lay a legend out in one transparent row that follows the page's text colour (changes it in place)."""
    legend.orientation = "horizontal"
    legend.location = place
    legend.background_fill_alpha = 0
    legend.border_line_color = None
    legend.label_text_font = FONT
    legend.label_text_font_size = "11px"
    legend.label_text_color = NEUTRAL
    legend.padding = legend.margin = 0
    legend.spacing = 14
    legend.stylesheets = [_LEGEND_STYLE]


def add_hover(figure: BokehFigure, renderers: list, tooltips: list[tuple[str, str]]) -> None:
    """Attach tooltips of `("label", "@column")` pairs; Bokeh escapes the values as long as no format is `{safe}`."""
    figure.add_tools(HoverTool(renderers=renderers, tooltips=tooltips, muted_policy="ignore"))


def plain(text: str) -> str | PlainText:
    """Text that Bokeh draws as it stands: a name that looks like TeX (`$$x$$`) must not be typeset."""
    return PlainText(text=text) if any(sign in text for sign in ("$$", r"\(", r"\[")) else text


def elide(text: str, length: int) -> str:
    """Shorten a dotted name: its longest words first, since the numbers tell layers apart; else in the middle.

    >>> elide("encoder.layer.11.attention.query", 24)
    'enc….lay….11.att….que…'
    >>> elide("classifier", 7)
    'cla…ier'
    """
    if len(text) <= length:
        return text
    words = text.split(".")
    for most in range(max(map(len, words)), 3, -1) if len(words) > 2 else ():
        short = ".".join(word if len(word) <= most else word[: most - 1] + "…" for word in words)
        if len(short) <= length:
            return short
    head = (length - 1) // 2
    return text[:head] + "…" + text[len(text) - (length - 1 - head) :]


def times(factor: float) -> str:
    """Write a ratio for reading.

    >>> times(8.874), times(4463.2)
    ('8.87×', '4,463×')
    """
    return f"{factor:.3g}×" if factor < 100 else f"{factor:,.0f}×"


def set_range(axis_range: Range1d, start: float, end: float) -> None:
    """Show [start, end] (changes the range in place); what a person zoomed to stays while the extent is the same."""
    if not (np.isfinite(start) and np.isfinite(end)):
        start, end = 0.0, 1.0
    if start == end:
        start, end = start - 0.5, end + 0.5
    if (axis_range.reset_start, axis_range.reset_end) != (start, end):
        axis_range.update(start=start, end=end, reset_start=start, reset_end=end)


def padded(low: float, high: float, share: float = 0.05) -> tuple[float, float]:
    """Widen an interval by a share of its length on both sides.

    >>> padded(0.0, 10.0, 0.1)
    (-1.0, 11.0)
    """
    room = (high - low) * share or abs(high) * share or share
    return low - room, high + room


def heat_colors(values: Iterable[float], low: float, high: float) -> list[str]:
    """Map numbers to cividis between low and high; what is not a number becomes neutral grey."""
    values = np.asarray(list(values), dtype=float)
    share = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    index = np.where(np.isfinite(share), share * (len(HEAT) - 1), 0).round().astype(int)
    return [HEAT[i] if ok else NEUTRAL for i, ok in zip(index, np.isfinite(values), strict=True)]


def log_ticks(axis: Axis, *, is_log: bool) -> None:
    """Label an axis whose positions are log10 of a value with the value itself, or go back to plain numbers."""
    if is_log:
        axis.ticker = FixedTicker(ticks=list(range(-9, 13)))
        axis.major_label_overrides = {exponent: decade(exponent) for exponent in range(-9, 13)}
    else:
        axis.ticker = BasicTicker()
        axis.major_label_overrides = {}


def decade(exponent: int) -> str:
    """Write 10**exponent shortly.

    >>> decade(2), decade(4), decade(-2), decade(-5)
    ('100', '10⁴', '0.01', '10⁻⁵')
    """
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def style_color_bar(bar: ColorBar) -> None:
    """Give a colour bar qlab's fonts and neutral ink (changes it in place)."""
    bar.title_text_font = bar.major_label_text_font = FONT
    bar.title_text_font_style = "normal"
    bar.title_text_font_size = bar.major_label_text_font_size = "11px"
    bar.title_text_color = bar.major_label_text_color = NEUTRAL
    bar.major_tick_line_color = None
    bar.border_line_color = bar.bar_line_color = None
    bar.padding = 4
