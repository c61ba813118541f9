"""Draws a Bokeh figure as a small static SVG: the picture in saved notebooks, where no JavaScript runs.

It reads the same models and sources as BokehJS, so it cannot show other numbers. It knows the glyphs that qlab's
figures use and raises on others; ranges must be explicit (`theme.new_figure` sees to it). Ink is a grey that reads on
white and on black. Marks beyond what a picture can resolve are merged, so that a figure stays near 30 KB.
"""

import html
import math
from collections.abc import Callable

import numpy as np
from bokeh.core.property.vectorization import Field, Value
from bokeh.models import BoxAnnotation, ColorBar, FixedTicker, Label, Legend, LogScale, PlainText, Span

from qlab.plots import theme
from qlab.plots.raster import indexed_png

MAX_MARKS = 1500  # about 15 bytes each; more quads become a raster, more markers are thinned


def draw_svg(figure, *, label: str = "") -> str:
    """Return the figure as an SVG document as wide as `theme.WIDTH`; `label` becomes its accessible title."""
    canvas = _Canvas(figure)
    body = [*_axes(canvas), '<g clip-path="url(#frame)">']
    body += [_annotation(canvas, item) for item in figure.center if isinstance(item, BoxAnnotation)]
    for renderer in figure.renderers:
        if renderer.visible and hasattr(renderer, "glyph"):
            body += _GLYPHS[type(renderer.glyph).__name__](canvas, renderer)
    body += [_annotation(canvas, item) for item in figure.center if isinstance(item, Span)]
    body += ["</g>", *(_label(canvas, item) for item in figure.center if isinstance(item, Label) and item.visible)]
    body += _legend(canvas) + _color_bar(canvas)
    body.append(_text(canvas.left, 15, _string(figure.title.text), size=13, weight="bold"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {theme.WIDTH} {canvas.height}" width="{theme.WIDTH}" '
        f'height="{canvas.height}" font-family="{theme.FONT}" font-size="11" fill="{theme.NEUTRAL}" role="img">'
        f"<title>{html.escape(label)}</title>"
        f'<clipPath id="frame"><path d="M{canvas.left} {canvas.top}h{canvas.frame_width}v{canvas.frame_height}'
        f'h-{canvas.frame_width}z"/></clipPath>{"".join(body)}</svg>'
    )


class _Canvas:
    """Where the frame lies in pixels, and the mapping from data to pixels."""

    def __init__(self, figure):
        self.figure = figure
        self.height = figure.height
        self.legends = [item for item in figure.above if isinstance(item, Legend) and item.items]
        self.bars = [item for item in figure.right if isinstance(item, ColorBar) and item.visible]
        self.y_ticks = _ticks(figure.yaxis[0], figure.y_range, figure.y_scale) if figure.yaxis[0].visible else []
        self.x_ticks = _ticks(figure.xaxis[0], figure.x_range, figure.x_scale) if figure.xaxis[0].visible else []
        widest = max((len(text) for _, text in self.y_ticks), default=0)
        self.left = 16 + round(6.2 * widest) + (16 if figure.yaxis[0].axis_label else 0)
        second = any(axis.visible for axis in figure.yaxis[1:])
        self.frame_width = theme.WIDTH - self.left - 14 - 56 * second - 64 * bool(self.bars)
        self.top = 24 + 18 * bool(self.legends)
        self.frame_height = self.height - self.top - (40 if self.x_ticks else 8)

    def x(self, values) -> np.ndarray:
        return self.left + _share(values, self.figure.x_range, self.figure.x_scale) * self.frame_width

    def y(self, values, range_name: str = "default") -> np.ndarray:
        extra = self.figure.extra_y_ranges.get(range_name, self.figure.y_range)
        scale = self.figure.y_scale if extra is self.figure.y_range else None
        return self.top + (1 - _share(values, extra, scale)) * self.frame_height


def _share(values, axis_range, scale) -> np.ndarray:
    values, start, end = np.asarray(values, dtype=float), axis_range.start, axis_range.end
    if isinstance(scale, LogScale):
        with np.errstate(divide="ignore", invalid="ignore"):
            values, start, end = np.log10(values), math.log10(start), math.log10(end)
    return np.clip((values - start) / (end - start), -2, 3)


# axes, title, legend ---------------------------------------------------------------------------------------------


def _ticks(axis, axis_range, scale) -> list[tuple[float, str]]:
    low, high = sorted((axis_range.start, axis_range.end))
    if isinstance(axis.ticker, FixedTicker):
        places = [place for place in axis.ticker.ticks if low <= place <= high]
        return [(place, _string(axis.major_label_overrides.get(place, f"{place:g}"))) for place in places]
    if isinstance(scale, LogScale):
        exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return [(10.0**exponent, theme.decade(exponent)) for exponent in exponents]
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    places = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return [(float(place), f"{place:.6g}") for place in places]


def _axes(canvas: _Canvas) -> list[str]:
    figure, bottom, right = canvas.figure, canvas.top + canvas.frame_height, canvas.left + canvas.frame_width
    lines, labels = [], []
    for place, text in canvas.x_ticks:
        x = canvas.x(place)
        lines.append(f"M{x:.0f} {canvas.top}V{bottom}")
        labels.append(_text(x, bottom + 14, text, anchor="middle"))
    for place, text in canvas.y_ticks:
        y = canvas.y(place)
        if figure.ygrid[0].visible:
            lines.append(f"M{canvas.left} {y:.0f}H{right}")
        labels.append(_text(canvas.left - 5, y + 4, text, anchor="end"))
    for axis in (axis for axis in figure.yaxis[1:] if axis.visible):
        extra = figure.extra_y_ranges[axis.y_range_name]
        labels += [
            _text(right + 5, canvas.y(place, axis.y_range_name) + 4, text) for place, text in _ticks(axis, extra, None)
        ]
        labels.append(_upright(theme.WIDTH - 6, canvas, _string(axis.axis_label or "")))
    if canvas.x_ticks:
        name = _string(figure.xaxis[0].axis_label or "")
        labels.append(_text((canvas.left + right) / 2, canvas.height - 8, name, anchor="middle", size=12))
    if canvas.y_ticks:
        labels.append(_upright(13, canvas, _string(figure.yaxis[0].axis_label or "")))
    return [f'<path d="{"".join(lines)}" stroke="{theme.NEUTRAL}" stroke-opacity=".25"/>', *labels]


def _upright(x: float, canvas: _Canvas, text: str) -> str:
    y = canvas.top + canvas.frame_height / 2
    return f'<text transform="rotate(-90 {x} {y:.0f})" {_at(x, y)} text-anchor="middle">{html.escape(text)}</text>'


def _legend(canvas: _Canvas) -> list[str]:
    parts, x = [], canvas.left
    for legend in canvas.legends:
        for item in legend.items:
            glyphs = [renderer for renderer in item.renderers if hasattr(renderer, "glyph")]
            color = _paint(glyphs[0], item.index or 0)
            shape = _value(glyphs[0], "marker", item.index or 0) if hasattr(glyphs[0].glyph, "marker") else "square"
            label = item.label.value if isinstance(item.label, Value) else str(item.label)
            parts += [_marker(x + 5, 33, 9, shape, 0, color), _text(x + 13, 37, label)]
            x += 28 + 6.2 * len(label)
    return parts


def _color_bar(canvas: _Canvas) -> list[str]:
    parts, x = [], canvas.left + canvas.frame_width + 16
    for bar in canvas.bars:
        palette, count = bar.color_mapper.palette, 16
        step = canvas.frame_height / count
        for i in range(count):
            color = palette[round((len(palette) - 1) * (1 - i / (count - 1)))]
            parts.append(f'<path d="M{x} {canvas.top + i * step:.1f}h12v{step + 0.5:.1f}h-12z" fill="{color}"/>')
        for value, y in (
            (bar.color_mapper.high, canvas.top + 9),
            (bar.color_mapper.low, canvas.top + canvas.frame_height),
        ):
            text = _string(bar.major_label_overrides.get(value, f"{value:.3g}"))
            parts.append(_text(x + 15, y, text))
        parts.append(_text(theme.WIDTH - 4, canvas.top - 6, _string(bar.title or ""), anchor="end"))
    return parts


def _label(canvas: _Canvas, label: Label) -> str:
    x, y = canvas.left + canvas.frame_width / 2, canvas.top + canvas.frame_height / 2
    return _text(x, y, _string(label.text), anchor="middle", size=13)


def _annotation(canvas: _Canvas, item: BoxAnnotation | Span) -> str:
    bottom, right = canvas.top + canvas.frame_height, canvas.left + canvas.frame_width
    if not item.visible:
        return ""
    if isinstance(item, Span):
        if item.location is None:
            return ""
        y_or_x = canvas.y(item.location) if item.dimension == "width" else canvas.x(item.location)
        path = (
            f"M{canvas.left} {y_or_x:.1f}H{right}"
            if item.dimension == "width"
            else f"M{y_or_x:.1f} {canvas.top}V{bottom}"
        )
    else:
        low, high = (
            canvas.x(edge) if isinstance(edge, int | float) else end
            for edge, end in ((item.left, canvas.left), (item.right, right))
        )
        path = f"M{low:.1f} {canvas.top}H{high:.1f}V{bottom}H{low:.1f}z"
    fill = (
        f'fill="{item.fill_color}" fill-opacity="{item.fill_alpha:g}"'
        if isinstance(item, BoxAnnotation)
        else 'fill="none"'
    )
    stroke = f'stroke="{item.line_color}" stroke-width="{item.line_width:g}"' if item.line_color else ""
    dash = ' stroke-dasharray="6 4"' if item.line_color and item.line_dash else ""
    return f'<path d="{path}" {fill} {stroke}{dash}/>'


# glyphs ----------------------------------------------------------------------------------------------------------


def _value(renderer, name: str, index: int | None = None):
    """A glyph property as a constant or a column; with `index`, that row's value."""
    value = getattr(renderer.glyph, name)
    data = renderer.data_source.data
    if isinstance(value, Field):
        value = value.field
    elif isinstance(value, Value):
        return value.value
    if isinstance(value, str) and value in data:
        column = data[value]
        return column if index is None else column[index] if len(column) > index else None
    return value


def _each(value, count: int) -> list:
    return list(value) if isinstance(value, list | np.ndarray) else [value] * count


def _paint(renderer, index: int) -> str:
    names = ("fill_color", "line_color", "text_color")
    colors = [_value(renderer, name, index) for name in names if hasattr(renderer.glyph, name)]
    return next((color for color in colors if color), theme.NEUTRAL)


def _quads(canvas: _Canvas, renderer) -> list[str]:
    count = len(next(iter(renderer.data_source.data.values()), []))
    left, right = (canvas.x(_each(_value(renderer, side), count)) for side in ("left", "right"))
    top, bottom = (canvas.y(_each(_value(renderer, side), count)) for side in ("top", "bottom"))
    colors, lines = (_each(_value(renderer, name), count) for name in ("fill_color", "line_color"))
    alpha = renderer.glyph.fill_alpha
    boxes = np.stack([np.minimum(left, right), np.minimum(top, bottom), abs(right - left), abs(bottom - top)], axis=1)
    drawn = [i for i in range(count) if np.isfinite(boxes[i]).all()]
    if (
        len(drawn) > MAX_MARKS and len(set(colors)) == 1
    ):  # a histogram finer than pixels: keep the tallest of each pixel
        tallest = {}
        for i in sorted(drawn, key=lambda i: boxes[i, 3]):
            tallest[round(boxes[i, 0])] = i
        drawn = sorted(tallest.values())
        boxes[:, 2] = np.maximum(boxes[:, 2], 1)
    elif len(drawn) > MAX_MARKS:
        frame = (canvas.left, canvas.top, canvas.frame_width, canvas.frame_height)
        return [_raster(frame, boxes[drawn], [colors[i] for i in drawn])]
    paths: dict[tuple, list[str]] = {}
    for i in drawn:
        x, y, width, height = boxes[i]
        paths.setdefault((colors[i], lines[i]), []).append(
            f"M{_short(x)} {_short(y)}h{_short(width)}v{_short(height)}h-{_short(width)}z"
        )
    return [
        f'<path d="{"".join(path)}" fill="{fill or "none"}" fill-opacity="{_alpha(alpha)}"'
        + (f' stroke="{line}"/>' if line else "/>")
        for (fill, line), path in paths.items()
    ]


def _raster(frame: tuple, boxes: np.ndarray, colors: list[str], size: tuple[int, int] = (160, 80)) -> str:
    left, top, width, height = frame
    palette = sorted(set(colors))
    cells = np.zeros((size[1], size[0]), dtype=np.uint8)  # 0 is transparent
    if len(palette) > 254:
        raise ValueError(f"a static picture holds 254 colours, this figure has {len(palette)}")
    number = {color: i + 1 for i, color in enumerate(palette)}
    scale = np.array([size[0] / width, size[1] / height])
    low = np.floor((boxes[:, :2] - (left, top)) * scale + 1e-6).astype(int)
    high = np.ceil((boxes[:, :2] + boxes[:, 2:] - (left, top)) * scale - 1e-6).astype(int)
    for (x0, y0), (x1, y1), color in zip(low.clip(0), high.clip(0), colors, strict=True):
        cells[y0:y1, x0:x1] = number[color]
    return (
        f'<image x="{left}" y="{top}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{indexed_png(cells, palette)}"/>'
    )


def _segments(canvas: _Canvas, renderer) -> list[str]:
    count = len(next(iter(renderer.data_source.data.values()), []))
    x0, x1 = (canvas.x(_each(_value(renderer, name), count)) for name in ("x0", "x1"))
    y0, y1 = (canvas.y(_each(_value(renderer, name), count)) for name in ("y0", "y1"))
    colors = _each(_value(renderer, "line_color"), count)
    paths: dict[str, dict[str, None]] = {}
    for i in np.flatnonzero(np.isfinite(x0 + x1 + y0 + y1)):
        path = f"M{_short(x0[i])} {_short(y0[i])}L{_short(x1[i])} {_short(y1[i])}"
        paths.setdefault(colors[i], {})[path] = None
    return [_stroke("".join(path), color, renderer.glyph) for color, path in paths.items()]


def _quadratics(canvas: _Canvas, renderer) -> list[str]:
    data = renderer.data_source.data
    count = len(next(iter(data.values()), []))
    xs = [canvas.x(_each(_value(renderer, name), count)) for name in ("x0", "cx", "x1")]
    ys = [canvas.y(_each(_value(renderer, name), count)) for name in ("y0", "cy", "y1")]
    path = "".join(
        f"M{xs[0][i]:.0f} {ys[0][i]:.0f}Q{xs[1][i]:.0f} {ys[1][i]:.0f} {xs[2][i]:.0f} {ys[2][i]:.0f}"
        for i in range(count)
    )
    return [_stroke(path, renderer.glyph.line_color, renderer.glyph)]


def _lines(canvas: _Canvas, renderer) -> list[str]:
    points = _polyline(canvas, renderer, "x", "y")
    mode = getattr(renderer.glyph, "mode", None)
    path, pen_up = "", True
    for i, (x, y) in enumerate(points):
        if not math.isfinite(x + y):
            pen_up = True
            continue
        if mode == "center" and not pen_up:
            path += f"H{_short((points[i - 1][0] + x) / 2)}V{_short(y)}H{_short(x)}"
        else:
            path += f"{'M' if pen_up else 'L'}{_short(x)} {_short(y)}"
        pen_up = False
    return [_stroke(path, renderer.glyph.line_color, renderer.glyph)]


def _area(canvas: _Canvas, renderer) -> list[str]:
    upper, lower = (_polyline(canvas, renderer, "x", name) for name in ("y1", "y2"))
    points = [point for point in [*upper, *reversed(lower)] if math.isfinite(sum(point))]
    path = "L".join(f"{_short(x)} {_short(y)}" for x, y in points)
    glyph = renderer.glyph
    return [f'<path d="M{path}z" fill="{glyph.fill_color}" fill-opacity="{glyph.fill_alpha:g}"/>'] if points else []


def _polyline(canvas: _Canvas, renderer, x_name: str, y_name: str) -> list[tuple[float, float]]:
    xs = canvas.x(_value(renderer, x_name))
    ys = canvas.y(_value(renderer, y_name), renderer.y_range_name)
    keep = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), 700)).round().astype(int)) if len(xs) else []
    return [(float(xs[i]), float(ys[i])) for i in keep]


def _scatter(canvas: _Canvas, renderer) -> list[str]:
    count = len(next(iter(renderer.data_source.data.values()), []))
    xs = canvas.x(_each(_value(renderer, "x"), count))
    ys = canvas.y(_each(_value(renderer, "y"), count), renderer.y_range_name)
    columns = [_each(_value(renderer, name), count) for name in ("size", "marker", "angle", "fill_color", "line_color")]
    marks = {}
    for x, y, size, marker, angle, fill, line in zip(xs, ys, *columns, strict=True):
        if math.isfinite(x + y) and marker:
            marks[_marker(x, y, size, marker, angle, fill, line)] = None
    marks = list(marks)
    step = math.ceil(len(marks) / 300)
    return marks[::step] if step else []


def _texts(canvas: _Canvas, renderer) -> list[str]:
    data = renderer.data_source.data
    count = len(next(iter(data.values()), []))
    xs, ys = (canvas.x(_value(renderer, "x")), canvas.y(_value(renderer, "y")))
    glyph = renderer.glyph
    anchor = {"center": "middle", "left": "start", "right": "end"}[glyph.text_align]
    size = int(glyph.text_font_size.removesuffix("px"))
    columns = [_each(_value(renderer, name), count) for name in ("text", "text_color")]
    across, up = glyph.x_offset, glyph.y_offset
    return [
        _text(x + across, y + up + size / 3, _string(text), anchor=anchor, size=size, color=color)
        for x, y, text, color in zip(xs, ys, *columns, strict=True)
        if math.isfinite(x + y) and text
    ]


_GLYPHS: dict[str, Callable] = {
    "Quad": _quads,
    "Segment": _segments,
    "Quadratic": _quadratics,
    "Line": _lines,
    "Step": _lines,
    "VArea": _area,
    "Scatter": _scatter,
    "Text": _texts,
}

# marks -----------------------------------------------------------------------------------------------------------

_SHAPES = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "square": "M-.9-.9H.9V.9H-.9z",
    "diamond": "M0-1.1L.9 0L0 1.1L-.9 0z",
    "triangle": "M0-1L1 .8H-1z",
    "inverted_triangle": "M0 1L1-.8H-1z",
    "hex": "M-1 0L-.5-.87H.5L1 0L.5.87H-.5z",
    "star": "M0-1.2L.3-.4L1.1-.4L.5.1L.7 .95L0 .45L-.7 .95L-.5.1L-1.1-.4L-.3-.4z",
    "x": "M-.9-.9L.9 .9M.9-.9L-.9 .9",
    "dash": "M-1 0H1",
}


def _marker(
    x: float, y: float, size: float, shape: str, angle: float, fill: str | None, line: str | None = None
) -> str:
    turn = f" rotate({-math.degrees(angle):.0f})" if angle else ""
    stroke = line or fill
    ink = f'stroke="{stroke}" fill="none"' if shape in ("x", "dash") else f'fill="{fill or "none"}"'
    if shape not in ("x", "dash") and line and line != fill:
        ink += f' stroke="{line}"'
    place = f'transform="translate({_short(x)} {_short(y)}){turn} scale({size / 2:g})"'
    return f'<path {place} d="{_SHAPES[shape]}" {ink} stroke-width="{3 / size:.2g}"/>'


def _stroke(path: str, color: str, glyph) -> str:
    dash = ' stroke-dasharray="6 4"' if glyph.line_dash else ""
    ink = f'stroke="{color}" stroke-width="{glyph.line_width:g}" stroke-opacity="{_alpha(glyph.line_alpha)}"{dash}'
    return f'<path d="{path}" fill="none" {ink}/>'


def _alpha(alpha) -> str:
    return f"{alpha if isinstance(alpha, int | float) else 1:g}"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, weight: str = "", color: str = ""
) -> str:
    if not text:
        return ""
    extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra += "" if size == 11 else f' font-size="{size}"'
    extra += f' font-weight="{weight}"' if weight else ""
    extra += f' fill="{color}"' if color and color != theme.NEUTRAL else ""
    return f"<text {_at(x, y)}{extra}>{html.escape(text)}</text>"


def _at(x: float, y: float) -> str:
    return f'x="{_short(x)}" y="{_short(y)}"'


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _string(text) -> str:
    return text.text if isinstance(text, PlainText) else str(getattr(text, "text", text))
