"""A lab as a page: the same state without a kernel, for a colleague or a saved notebook."""

import html
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from qlab.lab.lab import Lab

SHOWN = {
    "name": "layer",
    "title": "kind",
    "weight_bits": "weight bits",
    "weight_granularity": "weight grid",
    "weight_sqnr": "weight SQNR",
    "output_bits": "output bits",
    "output_rule": "output rule",
    "output_sqnr": "output SQNR",
    "noise": "noise of the layer",
}
STEPS = {
    "step": "step",
    "action": "action",
    "sqnr": "SQNR [dB]",
    "agreement": "agreement",
    "score": "score",
    "size_bytes": "weights [bytes]",
}
ROWS = 40
HISTOGRAMS = 6


def save_page(lab: "Lab", path: str | Path) -> Path:
    """Writes scores, the layers, the noisiest histograms and the history to one file that opens offline."""
    from qlab.plots import Code, Section, histogram, noise, save_html  # Bokeh is needed only here

    scores = lab.scores.to_pandas().drop(columns="is_stale")
    layers = lab.layers()
    measured = layers.loc[layers["noise"].notna(), ["name", "noise"]]
    figures = []
    for name, part in worst_tensors(layers, HISTOGRAMS):
        data = lab.histogram(name, part)
        clip = None if data.low is None or data.high is None else (data.low, data.high)
        share = data.clipped_share
        figures.append(histogram(data.bins, levels=data.levels, clip=clip, clipped=share, name=f"{name} {part}"))
    sections = [
        Section("Scores", (repr(lab), scores)),
        Section("Noise by layer", (noise(measured.rename(columns={"name": "layer", "noise": "sqnr"})),)),
        Section("Layers", (_shown(layers),)),
        Section("The tensors that lose most", tuple(figures)),
        Section("History", (lab.history.loc[~lab.history["is_undone"], list(STEPS)].rename(columns=STEPS),)),
        Section("As Python", (Code(lab.script()),)),
    ]
    return save_html(path, f"Quantization of a model: {lab.sim.preset.name}", sections)


def static_html(lab: "Lab") -> str:
    """The scores known and the first layers as escaped tables, without measuring anything."""
    frame = _shown(lab.layers())
    head = "".join(f"<th>{html.escape(column)}</th>" for column in frame.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>"
        for row in frame.head(ROWS).itertuples(index=False, name=None)
    )
    more = f"<p>{len(frame) - ROWS} more layers in lab.layers()</p>" if len(frame) > ROWS else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<p>{html.escape(repr(lab))}</p>{lab.known_scores._repr_html_()}{table}{more}"


def worst_tensors(layers: pd.DataFrame, most: int) -> list[tuple[str, str]]:
    """(layer, part) of the tensors with the least SQNR, each quantizer once."""
    found: list[tuple[float, str, str]] = []
    for row in layers.itertuples(index=False):
        if math.isfinite(row.weight_sqnr):
            found.append((row.weight_sqnr, row.name, "weight"))
        if math.isfinite(row.output_sqnr) and row.grid == row.name:
            found.append((row.output_sqnr, row.name, "output"))
    return [(name, part) for _, name, part in sorted(found)[:most]]


def _shown(layers: pd.DataFrame) -> pd.DataFrame:
    has_grid = layers["weight_bits"].notna() | layers["output_bits"].notna()
    return layers.loc[has_grid, list(SHOWN)].rename(columns=SHOWN)


def _cell(value: object) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)
