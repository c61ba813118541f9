"""The strokes of a static picture: markers, text and paths as short SVG strings."""

import html
import math
from collections.abc import Iterable

from qlab.plots import theme

# corners of each marker for a radius of 1, y downwards
_CORNERS = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "diamond": ((0, -1.1), (0.9, 0), (0, 1.1), (-0.9, 0)),
    "triangle": ((0, -1), (1, 0.8), (-1, 0.8)),
    "inverted_triangle": ((0, 1), (1, -0.8), (-1, -0.8)),
    "hex": ((-1, 0), (-0.5, -0.87), (0.5, -0.87), (1, 0), (0.5, 0.87), (-0.5, 0.87)),
    "star": tuple(
        (math.sin(i * math.pi / 5) * (0.5 if i % 2 else 1.2), -math.cos(i * math.pi / 5) * (0.5 if i % 2 else 1.2))
        for i in range(10)
    ),
}
_OPEN = {"x": (((-0.9, -0.9), (0.9, 0.9)), ((-0.9, 0.9), (0.9, -0.9))), "dash": (((-1, 0), (1, 0)),)}


def marker(x: float, y: float, size: float, shape: str, angle: float = 0.0) -> str:
    """A marker's outline as path data; `angle` in radians turns it anticlockwise, as in Bokeh."""
    radius = size / 2
    if shape == "circle":
        arc = f"a{short(radius)} {short(radius)} 0 1 0 "
        return f"M{short(x - radius)} {short(y)}{arc}{short(size)} 0{arc}{short(-size)} 0z"
    lines = _OPEN.get(shape, (_CORNERS.get(shape, ()),))
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
    turned = ([(x + a * cos + b * sin, y - a * sin + b * cos) for a, b in line] for line in lines)
    return "".join(polyline(line) for line in turned) + ("" if shape in _OPEN else "z")


def is_open(shape: str) -> bool:
    """Whether a marker has no inside to fill."""
    return shape in _OPEN


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """Points as path data, relative after the first because that is shorter."""
    parts: list[str] = []
    at = (0.0, 0.0)
    for x, y in points:
        x, y = round(x, 1), round(y, 1)
        parts.append(f"{'l' if parts else 'M'}{short(x - at[0])} {short(y - at[1])}")
        at = (x, y)
    return "".join(parts)


def box(x: float, y: float, width: float, height: float) -> str:
    """A rectangle as path data."""
    return f"M{short(x)} {short(y)}h{short(width)}v{short(height)}h{short(-width)}z"


def path(
    data: str,
    *,
    fill: str | None = None,
    stroke: str | None = None,
    width: float = 1,
    alpha: float = 1,
    dash: bool = False,
) -> str:
    """A path element; alpha applies to the fill, or to the stroke where there is no fill."""
    if not data:
        return ""
    ink = f' fill="{fill or "none"}"' + (f' fill-opacity="{alpha:g}"' if fill and alpha != 1 else "")
    if stroke:
        ink += f' stroke="{stroke}"' + (f' stroke-width="{width:g}"' if width != 1 else "")
        ink += f' stroke-opacity="{alpha:g}"' if not fill and alpha != 1 else ""
        ink += ' stroke-dasharray="6 4"' if dash else ""
    return f'<path d="{data}"{ink}/>'


def text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 11, weight: str = "", color: str = ""
) -> str:
    """An escaped text element; its ink is the picture's unless given."""
    if not words:
        return ""
    extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra += "" if size == 11 else f' font-size="{size}"'
    extra += f' font-weight="{weight}"' if weight else ""
    extra += f' fill="{color}"' if color and color != theme.NEUTRAL else ""
    return f'<text x="{short(x)}" y="{short(y)}"{extra}>{html.escape(words)}</text>'


def upright(x: float, y: float, words: str) -> str:
    """Text that reads from bottom to top, centred on a point."""
    place = f'x="{short(x)}" y="{short(y)}" text-anchor="middle" transform="rotate(-90 {short(x)} {short(y)})"'
    return f"<text {place}>{html.escape(words)}</text>" if words else ""


def short(number: float) -> str:
    """A coordinate to a tenth of a pixel, without needless digits.

    >>> short(12.04), short(-0.04), short(0.55)
    ('12', '0', '.6')
    """
    written = f"{number:.1f}".removesuffix(".0")
    if written == "-0":
        return "0"
    return written.replace("0.", ".", 1) if written.startswith(("0.", "-0.")) else written
