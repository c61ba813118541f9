"""Two steps of the history side by side: which settings differ, and what that did to each layer."""

import math

import ipywidgets
import pandas as pd

from qlab.lab import Lab
from qlab.plots import comparison
from qlab.views.bokeh_pane import BokehPane
from qlab.views.view import View, escape

MEASURES = {
    "weight SQNR": ("weight_sqnr", True),
    "output SQNR": ("output_sqnr", True),
    "weight bits": ("weight_bits", False),
    "output bits": ("output_bits", False),
}
SHOWN_ROWS = 200


class Compare(View):
    """Per-layer differences between two steps: by default between the beginning and now."""

    def __init__(self, lab: Lab, before: int = 0, after: int | None = None) -> None:
        super().__init__(lab)
        self._lab = lab
        self._follows = after is None
        self._is_drawing = False
        self._before = ipywidgets.Dropdown(description="Compare")
        self._after = ipywidgets.Dropdown(description="with")
        self._measure = ipywidgets.Dropdown(description="by", options=list(MEASURES))
        for widget, label, width in (
            (self._before, "64px", "280px"),
            (self._after, "30px", "250px"),
            (self._measure, "20px", "150px"),
        ):
            widget.style.description_width, widget.layout.width = label, width
            widget.observe(self.guarded(self._chosen), "value")
        self._figure = comparison(pd.DataFrame({"layer": [], "before": [], "after": []}))
        self.pane = BokehPane(self._figure.figure, fallback=self._figure.to_svg)
        self._table = ipywidgets.HTML(layout=ipywidgets.Layout(max_height="300px", overflow="auto"))
        self._table.add_class("qlab-report")
        self.pane.layout.flex, self._table.layout.flex = "3 1 420px", "2 1 440px"
        bar = ipywidgets.HBox(
            [self._before, self._after, self._measure],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        main = ipywidgets.HBox(
            [self.pane, self._table],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="8px 16px"),
        )
        self.redraw_on(lab.events.history_changed)
        self.display(bar, main)
        self._name_steps(before, lab.step if after is None else after)
        self.redraw_soon()

    @property
    def steps(self) -> tuple[int, int]:
        """The two steps compared."""
        return self._before.value, self._after.value

    def redraw(self) -> None:
        """Shows the differences of the two steps as they are now."""
        before, after = self.steps
        self._name_steps(before, self._lab.step if self._follows else after)
        frame = self._lab.compare(*self.steps)
        setting, higher_is_better = MEASURES[self._measure.value]
        rows = frame.loc[frame["setting"] == setting, ["layer", "before", "after"]].dropna()
        finite = [_is_finite(a) and _is_finite(b) for a, b in zip(rows["before"], rows["after"], strict=True)]
        with self.pane.batch():
            self._figure.figure.xaxis.axis_label = f"{self._measure.value}{' [dB]' if higher_is_better else ''}"
            self._figure.update(rows.loc[finite].astype({"before": float, "after": float}))
        self.pane.label = self._figure.headline
        self.pane.layout.display = None if any(finite) else "none"
        self._table.value = _table(frame)

    def to_html(self) -> str:
        """The differences as a table."""
        return self._table.value

    def _name_steps(self, before: int, after: int) -> None:
        history = self._lab.history
        options = [(f"{row.step}: {row.action}", row.step) for row in history.itertuples(index=False)]
        self._is_drawing = True
        try:
            for dropdown, chosen in ((self._before, before), (self._after, after)):
                if list(dropdown.options) != options:
                    dropdown.options = options
                dropdown.value = min(chosen, len(options) - 1)
        finally:
            self._is_drawing = False

    def _chosen(self, change: dict) -> None:
        if not self._is_drawing:
            self._follows = self._follows and change["owner"] is not self._after
            self.redraw_soon()


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _table(frame: pd.DataFrame) -> str:
    if not len(frame):
        return "<p>Nothing differs.</p>"
    body = "".join(
        f"<tr><td>{escape(row.layer)}</td><td>{escape(row.setting.replace('_', ' '))}</td>"
        f"<td>{escape(_shown(row.before))}</td><td>{escape(_shown(row.after))}</td></tr>"
        for row in frame.head(SHOWN_ROWS).itertuples(index=False)
    )
    more = f"<p>{len(frame) - SHOWN_ROWS} more in lab.compare(...)</p>" if len(frame) > SHOWN_ROWS else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("layer", "setting", "before", "after"))
    layers = frame["layer"].nunique()
    return (
        f"<p role='status'>{len(frame)} differences in {layers} layers</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
    )


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
