"""What every figure of qlab.plots is: a Bokeh figure, its sentence, a static picture and a page of its own.

A `Plot` as the last line of a cell shows a small SVG, which is also what an untrusted notebook, nbconvert or a code
host show. The live picture is the same `plot.figure` in a pane of `qlab.views` (`BokehPane(plot.figure)`), where
`plot.update(...)` changes it in place.
"""

import base64
import html
import textwrap
from pathlib import Path

from bokeh.models import Label, Node
from bokeh.plotting import figure as BokehFigure

from qlab.plots.picture import draw_svg
from qlab.plots.report import Section, save_html
from qlab.plots.theme import FONT, NEUTRAL, plain

TITLE_LETTERS = 84  # what a figure of full width holds in a line


class Plot:
    """A figure built once and updated in place; subclasses add `update(frame, ...)` and their sources.

    `figure` is an ordinary Bokeh figure: restyle it, lay it out with others, or hand it to a live pane.
    `headline` is the sentence in its title, which is also its label for screen readers and its one-line repr.
    `title_letters`: where the title goes on in another line; fewer for a figure that stands in a narrow place.
    """

    title_letters = TITLE_LETTERS

    def __init__(self, figure: BokehFigure):
        self.figure = figure
        self.headline = ""
        middle = {axis: Node(target=figure, symbol="center") for axis in ("x", "y")}
        self._message = Label(
            **middle, text="", visible=False, text_align="center", text_font=FONT, text_font_size="13px"
        )
        self._message.text_color = NEUTRAL
        figure.add_layout(self._message)

    def save(self, path: str | Path) -> Path:
        """Write one self-contained HTML page that opens offline, and return its path."""
        return save_html(path, self.headline or type(self).__name__, [Section(content=(self,))])

    def to_svg(self) -> str:
        """Draw the figure as it is now as a small static SVG."""
        return draw_svg(self.figure, label=self.headline)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.headline})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        # an <img> with a data URI passes JupyterLab's sanitizer in untrusted notebooks; inline <svg> is stripped there
        picture = base64.b64encode(self.to_svg().encode()).decode()
        alt = html.escape(self.headline, quote=True)
        return {
            "text/plain": repr(self),
            "text/html": f'<img alt="{alt}" style="max-width:100%" src="data:image/svg+xml;base64,{picture}">',
        }

    def say(self, headline: str) -> None:
        """Give the title and the screen reader's label another sentence, until the next update."""
        self.headline = " ".join(headline.split())
        self.figure.title.text = plain("\n".join(textwrap.wrap(self.headline, self.title_letters)))
        label = " ".join([self.headline, self._message.text]).strip()
        self.figure.html_attributes = {"role": "figure", "aria-label": label}

    def _say(self, headline: str, *, empty: str = "") -> None:
        """Set the title and the screen reader's label; `empty` is the sentence shown instead of data."""
        self._message.update(text=empty, visible=bool(empty))
        self.say(headline)
