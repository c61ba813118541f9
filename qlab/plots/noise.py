"""The quantization noise of each layer in execution order: SQNR bars, the noisy ones marked."""

from itertools import product

import numpy as np
import pandas as pd
from bokeh.models import Span

from qlab.plots import theme
from qlab.plots.columns import numbers, read_frame, texts
from qlab.plots.layer_rows import LayerRows

_COLUMNS = ("layer", "tensor", "sqnr", "end", "top", "bottom", "row", "color", "marker", "verdict")


def noise(frame: pd.DataFrame, *, limit: float = 20.0) -> "NoiseFigure":
    """Draw signal to quantization noise by layer in dB (higher is better).

    frame: one row per layer, or per layer and tensor, with `layer`, `sqnr` (dB; inf where nothing was lost), and
        optionally `tensor` ("weight", "output").
    limit: layers below this many dB are marked; 20 dB is noise of a tenth of the signal's amplitude.
    """
    plot = NoiseFigure(limit=limit)
    plot.update(frame)
    return plot


class NoiseFigure(LayerRows):
    """The live bars. Source columns beside those given: `end` (drawn end of the bar), `verdict`, `row`."""

    def __init__(self, *, limit: float = 20.0):
        super().__init__("SQNR [dB]", _COLUMNS)
        self._limit = limit
        figure = self.figure
        bars = figure.quad(
            0,
            "end",
            "top",
            "bottom",
            source=self.source,
            fill_color="color",
            line_color=None,
            fill_alpha=0.75,
            nonselection_fill_alpha=0.3,
        )
        self._ends = figure.scatter(
            "end",
            "row",
            source=self.source,
            marker="marker",
            size=8,
            fill_color="color",
            line_color="color",
            nonselection_alpha=0.3,
        )
        figure.add_layout(Span(location=limit, dimension="height", line_color=theme.NEUTRAL, line_dash="dashed"))
        tips = [("layer", "@layer"), ("tensor", "@tensor"), ("SQNR", "@sqnr{0.0} dB"), ("", "@verdict")]
        theme.add_hover(figure, [bars, self._ends], tips)

    def update(self, frame: pd.DataFrame) -> None:
        """Show other noise in place; the frame as in `noise`."""
        frame = read_frame(frame, ("layer", "sqnr"), "noise")
        chosen = self.layers_at(self.source.selected.indices)
        layer, tensor, sqnr = texts(frame, "layer"), texts(frame, "tensor"), numbers(frame, "sqnr", "noise")
        rows = {name: row for row, name in enumerate(dict.fromkeys(layer))}
        kinds = list(dict.fromkeys(tensor))
        height = 0.8 / max(len(kinds), 1)
        top = np.array(
            [rows[name] - 0.4 + kinds.index(kind) * height for name, kind in zip(layer, tensor, strict=True)],
            dtype=float,
        )
        finite = sqnr[np.isfinite(sqnr)]
        most = max([self._limit, *finite]) * 1.1
        end = np.where(np.isposinf(sqnr), most, np.where(np.isfinite(sqnr), sqnr, 0.0))
        verdict = [_verdict(value, self._limit) for value in sqnr]
        self.source.data = {
            "layer": layer,
            "tensor": tensor,
            "sqnr": sqnr,
            "end": end,
            "verdict": verdict,
            "top": top + height * 0.08,
            "bottom": top + height * 0.92,
            "row": top + height / 2,
            "color": [
                theme.NEUTRAL if text == "not measured" else theme.SERIES[kinds.index(kind) % len(theme.SERIES)]
                for text, kind in zip(verdict, tensor, strict=True)
            ],
            "marker": [_sign(text, kinds.index(kind)) for text, kind in zip(verdict, tensor, strict=True)],
        }
        self._set_rows(list(rows))
        self.select(chosen)
        alike = list(zip(tensor, verdict, strict=True))
        looks = [
            (", ".join(filter(None, look)) or f"{self._limit:g} dB or more", look)
            for look in product(kinds, ("", _below(self._limit)))
        ]
        self._set_legend([(name, [self._ends], alike.index(look)) for name, look in looks if look in alike])
        theme.set_range(self.figure.x_range, *theme.padded(min([0.0, *finite]), most, 0.03))
        if not layer:
            self._say("noise by layer", empty="No layer was measured: the analysis has no rows.")
            return
        noisy = len({name for name, text in zip(layer, verdict, strict=True) if text.startswith("below")})
        worst = layer[int(np.nanargmin(np.where(np.isnan(sqnr), np.inf, sqnr)))]
        low = f", lowest {finite.min():.1f} dB at {theme.elide(worst, 40)}" if len(finite) else ""
        self._say(f"{noisy} of {len(rows)} layers below {self._limit:g} dB{low}{self._more_rows()}")


def _sign(verdict: str, number: int) -> str:
    if verdict.startswith("below"):
        return ("triangle", "inverted_triangle")[number % 2]
    return {"exact": "star", "not measured": "x"}.get(verdict, theme.MARKERS[number % 2])


def _verdict(sqnr: float, limit: float) -> str:
    if np.isnan(sqnr):
        return "not measured"
    if np.isposinf(sqnr):
        return "exact"
    return _below(limit) if sqnr < limit else ""


def _below(limit: float) -> str:
    return f"below {limit:g} dB"
