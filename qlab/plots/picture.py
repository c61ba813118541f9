"""Draws a Bokeh figure as a small static SVG: the picture in saved notebooks, where no JavaScript runs.

It reads the same models and sources as BokehJS, so it cannot show other numbers. It knows the glyphs that qlab's
figures use; ranges must be explicit (`theme.new_figure` sees to it). Ink is a grey that reads on white and on black.
"""

import html

from bokeh.core.property.vectorization import Value
from bokeh.models import BoxAnnotation, Label, Span
from bokeh.plotting import figure as BokehFigure

from qlab.plots import svg_marks as svg
from qlab.plots import theme
from qlab.plots.svg_frame import Frame, plain_text, ticks
from qlab.plots.svg_glyphs import draw_glyph, value


def draw_svg(figure: BokehFigure, *, label: str = "") -> str:
    """Return the figure as an SVG document as wide as `theme.WIDTH`; `label` becomes its accessible title."""
    frame = Frame(figure)
    annotations = [item for item in figure.center if isinstance(item, BoxAnnotation | Span) and item.visible]
    labels = [item for item in figure.center if isinstance(item, Label) and item.visible]
    body = [*_axes(frame), '<g clip-path="url(#frame)">']
    body += [_box(frame, item) for item in annotations if isinstance(item, BoxAnnotation)]
    for renderer in figure.renderers:
        if renderer.visible:
            body += draw_glyph(frame, renderer)
    body += [_span(frame, item) for item in annotations if isinstance(item, Span)]
    body += ["</g>", *_legend(frame), *_color_bar(frame)]
    middle = ((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2)
    body += [svg.text(*middle, plain_text(item.text), anchor="middle", size=13) for item in labels]
    body += [svg.text(frame.left, 15 + 15 * i, line, size=12, weight="bold") for i, line in enumerate(frame.title)]
    clip = svg.box(frame.left, frame.top, frame.right - frame.left, frame.bottom - frame.top)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {theme.WIDTH} {frame.height}" width="{theme.WIDTH}" '
        f'height="{frame.height}" font-family="{theme.FONT}" font-size="11" fill="{theme.NEUTRAL}" role="img">'
        f'<title>{html.escape(label)}</title><clipPath id="frame"><path d="{clip}"/></clipPath>{"".join(body)}</svg>'
    )


def _axes(frame: Frame) -> list[str]:
    figure, lines, words = frame.figure, [], []
    for place, name in frame.x_ticks:
        x = float(frame.x(place))
        lines.append(f"M{svg.short(x)} {frame.top}V{frame.bottom}" if figure.xgrid[0].visible else "")
        words.append(svg.text(x, frame.bottom + 14, name, anchor="middle"))
    for place, name in frame.y_ticks:
        y = float(frame.y(place))
        lines.append(f"M{frame.left} {svg.short(y)}H{frame.right}" if figure.ygrid[0].visible else "")
        words.append(svg.text(frame.left - 5, y + 4, name, anchor="end"))
    middle = (frame.top + frame.bottom) / 2
    for axis in frame.more_axes:
        for place, name in ticks(axis, figure.extra_y_ranges[axis.y_range_name]):
            words.append(svg.text(frame.right + 5, float(frame.y(place, axis.y_range_name)) + 4, name))
        words.append(svg.upright(theme.WIDTH - 6, middle, plain_text(axis.axis_label or "")))
    if frame.x_ticks:
        name = plain_text(figure.xaxis[0].axis_label or "")
        words.append(svg.text((frame.left + frame.right) / 2, frame.height - 8, name, anchor="middle", size=12))
    if frame.y_ticks:
        words.append(svg.upright(13, middle, plain_text(figure.yaxis[0].axis_label or "")))
    return [svg.path("".join(lines), stroke=theme.NEUTRAL, alpha=0.25), *words]


def _legend(frame: Frame) -> list[str]:
    parts, x, y = [], float(frame.left), frame.top - 14
    for item in (item for legend in frame.legends for item in legend.items):
        renderer, row = item.renderers[0], item.index or 0
        name = item.label.value if isinstance(item.label, Value) else str(item.label)
        shape = {"Line": "dash", "Segment": "dash"}.get(type(renderer.glyph).__name__, "square")
        shape = value(renderer, "marker", row) or shape
        fill, line = (value(renderer, ink, row) for ink in ("fill_color", "line_color"))
        is_open = svg.is_open(shape)
        sign = svg.marker(x + 5, y, 10, shape)
        parts.append(
            svg.path(sign, fill=None if is_open else fill, stroke=line if is_open or line != fill else None, width=2)
        )
        parts.append(svg.text(x + 14, y + 4, name))
        x += 30 + 6.2 * len(name)
    return parts


def _color_bar(frame: Frame) -> list[str]:
    parts, x, count = [], frame.right + 16, 16
    step = (frame.bottom - frame.top) / count
    for bar in frame.bars:
        mapper = bar.color_mapper
        for i in range(count):
            color = mapper.palette[round((len(mapper.palette) - 1) * (1 - i / (count - 1)))]
            parts.append(svg.path(svg.box(x, frame.top + i * step, 12, step + 0.5), fill=color))
        for end, y in ((mapper.high, frame.top + 9), (mapper.low, frame.bottom)):
            parts.append(svg.text(x + 15, y, plain_text(bar.major_label_overrides.get(end, f"{end:.3g}"))))
        parts.append(svg.upright(x - 4, (frame.top + frame.bottom) / 2, plain_text(bar.title or "")))
    return parts


def _span(frame: Frame, span: Span) -> str:
    if span.location is None:
        return ""
    if span.dimension == "width":
        line = f"M{frame.left} {svg.short(float(frame.y(span.location)))}H{frame.right}"
    else:
        line = f"M{svg.short(float(frame.x(span.location)))} {frame.top}V{frame.bottom}"
    return svg.path(line, stroke=span.line_color, width=span.line_width, dash=bool(span.line_dash))


def _box(frame: Frame, box: BoxAnnotation) -> str:
    left, right = (
        float(frame.x(side)) if isinstance(side, int | float) else edge
        for side, edge in ((box.left, frame.left), (box.right, frame.right))
    )
    parts = [
        svg.path(
            svg.box(left, frame.top, right - left, frame.bottom - frame.top), fill=box.fill_color, alpha=box.fill_alpha
        )
    ]
    if box.line_color:
        sides = f"M{svg.short(left)} {frame.top}V{frame.bottom}M{svg.short(right)} {frame.top}V{frame.bottom}"
        parts.append(svg.path(sides, stroke=box.line_color, width=box.line_width, dash=bool(box.line_dash)))
    return "".join(parts)
