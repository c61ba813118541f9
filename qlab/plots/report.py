"""One self-contained HTML page: headings, text, tables and live Bokeh figures, opening offline.

BokehJS is inside the page (about 1.3 MB) and the page's own policy forbids every request, so nothing is fetched even by
mistake. Everything that comes from names is escaped. The page follows the reader's light or dark setting.
"""

import html
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from bokeh.embed import components
from bokeh.model import Model
from bokeh.resources import Resources

from qlab.plots.theme import STYLE


class Code(str):
    """Text that is shown line by line as it stands."""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading and what follows it.

    `content` holds text (a blank line starts a paragraph), `Code`, DataFrames (tables, their `attrs["caption"]` above
    them), and figures: a `Plot` or any Bokeh model.
    """

    heading: str = ""
    content: Sequence = ()


def save_html(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page beside `path` and rename it into place, so that a failure leaves no half-written file.

    Raises OSError saying what to do when the folder is missing or cannot be written.
    """
    path = Path(path)
    page = render_html(title, sections)
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write '{path}': {reason}. Choose a folder that exists and is writable."
        raise type(error)(error.errno, message) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        Path(beside).chmod(0o666 & ~_umask())
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return path


def render_html(title: str, sections: Sequence[Section]) -> str:
    """Return the page as text; figures that are live in a pane stay so.

    Raises ValueError if one figure is to stand in two places: a Bokeh model is drawn once in a document.
    """
    figures = [figure for section in sections for item in section.content if (figure := _figure(item)) is not None]
    if len({figure.id for figure in figures}) < len(figures):
        raise ValueError("a figure stands twice in this page: build a second one from the same data.")
    script, places = components(tuple(figures), wrap_script=False) if figures else ("", ())
    library = Resources(mode="inline", components=["bokeh"]).render() if figures else ""
    places = iter(places)
    body = []
    for number, section in enumerate(sections):
        body.append(f'<section aria-labelledby="section-{number}">' if section.heading else "<section>")
        if section.heading:
            body.append(f'<h2 id="section-{number}">{html.escape(section.heading)}</h2>')
        for item in section.content:
            if isinstance(item, Code):
                body.append(f'<pre tabindex="0">{html.escape(item)}</pre>')
            elif isinstance(item, str):
                body += [f"<p>{html.escape(part.strip())}</p>" for part in item.split("\n\n") if part.strip()]
            elif isinstance(item, pd.DataFrame):
                body.append(table_html(item))
            else:
                body.append(f'<div class="qlab-plot">{next(places)}</div>')
        body.append("</section>")
    contents = _contents(sections)
    return _PAGE.format(
        title=html.escape(title),
        policy=_POLICY,
        style=_PAGE_STYLE + STYLE,
        library=library,
        contents=contents,
        body="\n".join(body),
        script=f"<script>{script}\n{_REPAINT}</script>" if figures else "",
    )


def table_html(frame: pd.DataFrame, *, digits: int = 4) -> str:
    """Return an escaped HTML table; numbers to `digits` significant digits, missing values as a dash."""
    numeric = [pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind) for kind in frame.dtypes]
    head = "".join(
        f'<th scope="col"{_right(is_right)}>{html.escape(str(name))}</th>'
        for name, is_right in zip(frame.columns, numeric, strict=True)
    )
    rows = []
    for row in frame.itertuples(index=False, name=None):
        cells = "".join(
            f"<td{_right(is_right)}>{html.escape(_cell(value, digits))}</td>"
            for value, is_right in zip(row, numeric, strict=True)
        )
        rows.append(f"<tr>{cells}</tr>")
    caption = frame.attrs.get("caption", "")
    caption = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="table" tabindex="0">{table}</div>'


def _figure(item: object) -> Model | None:
    if isinstance(item, str | pd.DataFrame):
        return None
    figure = getattr(item, "figure", item)
    if not isinstance(figure, Model):
        raise TypeError(f"a section holds text, DataFrames and figures, not {type(item).__name__}.")
    return figure


def _cell(value: object, digits: int) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return "–"
    if isinstance(value, float | np.floating):
        return "–" if math.isnan(value) else f"{value:.{digits}g}"
    return str(value)


def _right(is_right: bool) -> str:
    return ' class="number"' if is_right else ""


def _contents(sections: Sequence[Section]) -> str:
    headed = [(number, section.heading) for number, section in enumerate(sections) if section.heading]
    if len(headed) < 3:
        return ""
    links = "".join(f'<li><a href="#section-{number}">{html.escape(heading)}</a></li>' for number, heading in headed)
    return f'<nav aria-label="contents"><ul>{links}</ul></nav>'


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_PAGE_STYLE = """
:root { color-scheme: light dark; --jp-layout-color0: #ffffff; --jp-ui-font-color1: #212121;
  --jp-ui-font-color2: #616161; --jp-border-color1: #bdbdbd; --jp-border-color2: #e0e0e0; }
@media (prefers-color-scheme: dark) { :root { --jp-layout-color0: #111111; --jp-ui-font-color1: #e8e8e8;
  --jp-ui-font-color2: #b5b5b5; --jp-border-color1: #616161; --jp-border-color2: #424242; } }
body { font: 14px/1.5 system-ui, sans-serif; background: var(--jp-layout-color0); color: var(--jp-ui-font-color1);
  max-width: 760px; margin: 24px auto; padding: 0 16px; overflow-wrap: anywhere; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 32px; } a { color: inherit; }
.table { overflow: auto; max-height: 480px; margin: 12px 0; }
table { border-collapse: collapse; font-size: 13px; } caption { text-align: left; font-weight: 600; }
th, td { overflow-wrap: break-word; max-width: 24em; padding: 3px 10px;
  border-bottom: 1px solid var(--jp-border-color2); text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: var(--jp-layout-color0); }
pre { overflow: auto; max-height: 480px; padding: 8px; border: 1px solid var(--jp-border-color2); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
div.qlab-plot { margin: 12px 0; }
"""

# canvas ink is read from CSS when painting: paint again when the reader's setting changes
_REPAINT = """
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const view of Object.values(Bokeh.index)) view.request_repaint?.();
});
"""

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "  # BokehJS and its callbacks, both inside the page
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
{library}
</head>
<body>
<main>
<h1>{title}</h1>
{contents}
{body}
</main>
{script}
</body>
</html>
"""
