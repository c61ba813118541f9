"""Draws the glyphs of one Bokeh renderer as SVG, from the glyph's own properties and the source's own columns.

Marks outside the frame are left out, marks of one look share a path, and many small cells become one raster.
"""

from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from bokeh.core.property.vectorization import Field, Value
from bokeh.models import GlyphRenderer

from qlab.plots import svg_marks as svg
from qlab.plots.raster import indexed_png
from qlab.plots.svg_frame import Frame

MOST_CELLS = 600  # coloured boxes beyond this are drawn as an image with one pixel per cell
MOST_POINTS = 300  # of a line
MOST_MARKERS = 360


def draw_glyph(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    """Return SVG elements for a renderer; `frame` maps data to pixels (`x`, `y`, and its edges).

    Raises KeyError for a glyph that qlab's figures do not use.
    """
    return _DRAWERS[type(renderer.glyph).__name__](frame, renderer)


def value(renderer: GlyphRenderer, name: str, index: int | None = None) -> Any:
    """A glyph property: a constant, or its column; with `index` that row's value."""
    found = getattr(renderer.glyph, name, None)
    data = renderer.data_source.data
    if isinstance(found, Value):
        return found.value
    column = found.field if isinstance(found, Field) else found
    if not isinstance(column, str) or column not in data:
        return found
    return data[column] if index is None else data[column][index] if index < len(data[column]) else None


def _count(renderer: GlyphRenderer) -> int:
    return len(next(iter(renderer.data_source.data.values()), []))


def _each(renderer: GlyphRenderer, name: str) -> list:
    found = value(renderer, name)
    return list(found) if isinstance(found, list | np.ndarray) else [found] * _count(renderer)


def _number(renderer: GlyphRenderer, name: str) -> float:
    found = getattr(renderer.glyph, name, 1)
    return found if isinstance(found, int | float) else 1


def _grouped(rows: list[int], *looks: list) -> Iterator[tuple[tuple, list[int]]]:
    """Rows of equal look, in order of first appearance."""
    groups: dict[tuple, list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(look[row] for look in looks), []).append(row)
    yield from groups.items()


def _quads(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    left, right = (frame.x(_each(renderer, side)) for side in ("left", "right"))
    top, bottom = (frame.y(_each(renderer, side)) for side in ("top", "bottom"))
    (left, right), (top, bottom) = (np.sort([a, b], axis=0) for a, b in ((left, right), (top, bottom)))
    with np.errstate(invalid="ignore"):
        is_shown = (right >= frame.left) & (left <= frame.right) & (bottom > frame.top) & (top < frame.bottom)
    rows = np.flatnonzero(is_shown).tolist()
    fills, lines = _each(renderer, "fill_color"), _each(renderer, "line_color")
    alpha, width = _number(renderer, "fill_alpha"), _number(renderer, "line_width")
    if len(rows) > 1 and len({fills[i] for i in rows}) == 1 and np.allclose(left[rows][1:], right[rows][:-1]):
        outline = _skyline(left[rows], right[rows], top[rows], float(bottom[rows[0]]))
        return [svg.path(outline, fill=fills[rows[0]], alpha=alpha)]
    if len(rows) > MOST_CELLS and len({fills[i] for i in rows}) > 1:
        return [_cells(left[rows], right[rows], top[rows], bottom[rows], [fills[i] for i in rows])]
    return [
        svg.path(
            "".join(svg.box(left[i], top[i], max(right[i] - left[i], 0.7), bottom[i] - top[i]) for i in group),
            fill=fill,
            stroke=line if line != fill or alpha < 0.5 else None,
            width=width,
            alpha=alpha,
        )
        for (fill, line), group in _grouped(rows, fills, lines)
    ]


def _skyline(left: np.ndarray, right: np.ndarray, top: np.ndarray, base: float) -> str:
    """The outline of bars that stand side by side; of bars narrower than a pixel the tallest in each pixel."""
    if np.median(right - left) < 1:
        pixel = np.round(left).astype(int)
        starts = np.flatnonzero(np.diff(pixel, prepend=pixel[0] - 1))
        left, top = pixel[starts].astype(float), np.minimum.reduceat(top, starts)
        right = np.append(left[1:], right[-1])
    outline = f"M{svg.short(left[0])} {svg.short(base)}"
    for height, group in groupby(zip(right, top, strict=True), key=lambda bar: round(bar[1], 1)):
        outline += f"V{svg.short(height)}H{svg.short(list(group)[-1][0])}"
    return f"{outline}V{svg.short(base)}z"


def _cells(left: np.ndarray, right: np.ndarray, top: np.ndarray, bottom: np.ndarray, colors: list[str]) -> str:
    """A heat map as an image: one pixel per cell of the grid that the boxes lie on, empty places transparent."""
    palette = sorted(set(colors))
    number = {color: i + 1 for i, color in enumerate(palette)}
    lefts, tops = np.unique(left.round(2)), np.unique(top.round(2))
    cells = np.zeros((len(tops), len(lefts)), dtype=np.uint8)
    places = np.searchsorted(tops, top.round(2)), np.searchsorted(lefts, left.round(2))
    cells[places] = [number[color] for color in colors]
    width, height = float((right - left).max()), float((bottom - top).max())
    return (
        f'<image x="{lefts[0]}" y="{tops[0]}" width="{svg.short(lefts[-1] + width - lefts[0])}" '
        f'height="{svg.short(tops[-1] + height - tops[0])}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{indexed_png(cells, palette)}"/>'
    )


def _segments(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    x0, x1 = (frame.x(_each(renderer, name)) for name in ("x0", "x1"))
    y0, y1 = (frame.y(_each(renderer, name)) for name in ("y0", "y1"))
    rows = _within(frame, x0, x1, y0, y1)
    return [
        svg.path(
            "".join(dict.fromkeys(svg.polyline([(x0[i], y0[i]), (x1[i], y1[i])]) for i in group)),
            stroke=color,
            width=_number(renderer, "line_width"),
            alpha=_number(renderer, "line_alpha"),
        )
        for (color,), group in _grouped(rows, _each(renderer, "line_color"))
    ]


def _within(frame: Frame, x0: np.ndarray, x1: np.ndarray, y0: np.ndarray, y1: np.ndarray) -> list[int]:
    with np.errstate(invalid="ignore"):
        across = (np.maximum(x0, x1) >= frame.left) & (np.minimum(x0, x1) <= frame.right)
        down = (np.maximum(y0, y1) >= frame.top) & (np.minimum(y0, y1) <= frame.bottom)
    return np.flatnonzero(across & down).tolist()


def _quadratics(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    (x0, cx, x1), (y0, cy, y1) = (
        [to_pixels(_each(renderer, name)).round().astype(int) for name in names]
        for to_pixels, names in ((frame.x, ("x0", "cx", "x1")), (frame.y, ("y0", "cy", "y1")))
    )
    is_straight = abs((x1 - x0) * (cy - y0) - (y1 - y0) * (cx - x0)) < 2 * np.hypot(x1 - x0, y1 - y0)
    curves = (
        f"M{x0[i]} {y0[i]}l{x1[i] - x0[i]} {y1[i] - y0[i]}"
        if is_straight[i]
        else f"M{x0[i]} {y0[i]}q{cx[i] - x0[i]} {cy[i] - y0[i]} {x1[i] - x0[i]} {y1[i] - y0[i]}"
        for i in range(len(x0))
    )
    return [svg.path("".join(curves), stroke=renderer.glyph.line_color, alpha=_number(renderer, "line_alpha"))]


def _lines(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    is_step = hasattr(renderer.glyph, "mode")
    pieces = []
    line = _points(frame, renderer, "y", thin=not is_step)
    for finite, group in groupby(line, key=lambda point: np.isfinite(sum(point))):
        points = list(group)
        if finite and is_step:  # mode "center": the line changes height midway
            middles = [(a[0] + b[0]) / 2 for a, b in pairwise(points)]
            heights = [svg.short(y) for _, y in points]
            corners = "".join(f"H{svg.short(x)}V{y}" for x, y in zip(middles, heights[1:], strict=True))
            pieces.append(f"M{svg.short(points[0][0])} {heights[0]}{corners}H{svg.short(points[-1][0])}")
        elif finite:
            pieces.append(svg.polyline(points))
    glyph = renderer.glyph
    look = {"width": glyph.line_width, "alpha": _number(renderer, "line_alpha"), "dash": bool(glyph.line_dash)}
    return [svg.path("".join(pieces), stroke=glyph.line_color, **look)]


def _area(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    edges = [*_points(frame, renderer, "y1"), *reversed(_points(frame, renderer, "y2"))]
    outline = svg.polyline(point for point in edges if np.isfinite(sum(point)))
    return [svg.path(outline and outline + "z", fill=renderer.glyph.fill_color, alpha=_number(renderer, "fill_alpha"))]


def _points(frame: Frame, renderer: GlyphRenderer, y_name: str, *, thin: bool = True) -> list[tuple[float, float]]:
    xs, ys = frame.x(value(renderer, "x")), frame.y(value(renderer, y_name), renderer.y_range_name)
    most = MOST_POINTS if thin else len(xs)
    keep = np.linspace(0, len(xs) - 1, min(len(xs), most)).round().astype(int)
    return [(float(xs[i]), float(ys[i])) for i in keep]


def _scatter(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    xs, ys = frame.x(_each(renderer, "x")), frame.y(_each(renderer, "y"), renderer.y_range_name)
    shapes, sizes, angles = (_each(renderer, name) for name in ("marker", "size", "angle"))
    rows = [i for i in _within(frame, xs, xs, ys, ys) if shapes[i]]
    rows = rows[:: -(-len(rows) // MOST_MARKERS) or 1]
    elements = []
    looks = [[svg.is_open(shape) for shape in shapes], _each(renderer, "fill_color"), _each(renderer, "line_color")]
    for (is_open, fill, line), group in _grouped(rows, *looks):
        data = "".join(dict.fromkeys(svg.marker(xs[i], ys[i], sizes[i], shapes[i], angles[i]) for i in group))
        width = 1.5 if is_open or not fill else 1
        stroke = (line or fill) if is_open or fill != line else None
        elements.append(svg.path(data, fill=None if is_open else fill, stroke=stroke, width=width))
    return elements


def _texts(frame: Frame, renderer: GlyphRenderer) -> list[str]:
    glyph = renderer.glyph
    xs, ys = frame.x(_each(renderer, "x")) + glyph.x_offset, frame.y(_each(renderer, "y")) + glyph.y_offset
    words = _each(renderer, "text")
    size = int(glyph.text_font_size.removesuffix("px"))
    weight = "bold" if glyph.text_font_style == "bold" else ""
    rows = [i for i in _within(frame, xs, xs, ys, ys) if words[i]]
    anchor = {"left": "start", "center": "middle", "right": "end"}[glyph.text_align]
    return [svg.text(xs[i], ys[i] + size / 3, words[i], anchor=anchor, size=size, weight=weight) for i in rows]


_DRAWERS: dict[str, Callable] = {
    "Quad": _quads,
    "Segment": _segments,
    "Quadratic": _quadratics,
    "Line": _lines,
    "Step": _lines,
    "VArea": _area,
    "Scatter": _scatter,
    "Text": _texts,
}
