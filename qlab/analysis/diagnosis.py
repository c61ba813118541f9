"""Diagnosis: why one layer loses what it loses, and what would help."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qlab.analysis.causes import causes_of
from qlab.analysis.decomposition import decompose
from qlab.analysis.fixes import Before, Fix, Trials, possible_fixes
from qlab.analysis.group import Group
from qlab.analysis.layer_noise import layer_noise
from qlab.analysis.shadow import require_calibrated, shadow
from qlab.analysis.units import units_of
from qlab.errors import InputError
from qlab.graph import Replay, call_layer
from qlab.graph.layer_graph import Call
from qlab.progress import Progress, Silent
from qlab.sim import QuantSim


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Why a layer loses what it loses.

    layer: as asked. layers: what is computed as one with it. sqnr: of their output, in dB. parts: the error taken
    apart, see `decompose`. causes: (part, sentence) of what costs most: inherited, and of the layer's own. fixes: what
    would help, the best first, each with its gain. before: the model's results, with which fixes are compared;
    None where none was tried.
    """

    layer: str
    layers: tuple[str, ...]
    sqnr: float
    parts: pd.DataFrame
    causes: tuple[tuple[str, str], ...]
    fixes: tuple[Fix, ...]
    before: Before | None = field(default=None, repr=False)

    def measured_gain(self, sim: QuantSim) -> tuple[float, float]:
        """What was truly gained since, in dB of the model's result, and its standard error: by full runs of `sim` as it
        is now on the batches of the diagnosis, to be compared with a `Fix.predicted_gain`."""
        if self.before is None:
            raise InputError(f"no fix was tried on {self.layer!r}: there is nothing to compare with.")
        return self.before.gain_of(sim)

    @property
    def cause(self) -> str:
        """The causes as text."""
        return " ".join(sentence for _, sentence in self.causes) or "Nothing is lost here."

    @property
    def table(self) -> pd.DataFrame:
        """The fixes as rows: label, predicted_gain [dB of the model's result], gain_error, verb."""
        rows = [(fix.label, fix.predicted_gain, fix.gain_error, fix.verb) for fix in self.fixes]
        return pd.DataFrame(rows, columns=["fix", "predicted_gain", "gain_error", "verb"])

    def __repr__(self) -> str:
        shares = ", ".join(f"{row.part} {row.share:.0%}" for row in self.parts.itertuples() if abs(row.share) >= 0.005)
        lines = [f"{self.layer}: SQNR {self.sqnr:.1f} dB ({shares or 'no error'})", f"  {self.cause}"]
        return "\n".join(lines + [f"  {fix.predicted_gain:+6.2f} dB  {fix.label}" for fix in self.fixes])

    def to_html(self) -> str:
        """The cause in a sentence and the parts as a table, every name escaped."""
        rows = "".join(
            f"<tr><td>{row.part}</td><td style='{_bar(row.share)}'>{row.share:.1%}</td>"
            f"<td>{row.share_error:.1%}</td><td>{row.sqnr:.1f}</td></tr>"
            for row in self.parts.assign(share=self.parts.share.round(3) + 0.0).itertuples(index=False)  # no -0.0%
            if row.mse
        )
        head = "".join(f'<th scope="col">{name}</th>' for name in ("part of the error", "share", "±", "SQNR [dB]"))
        return (
            f"<p><b>{escape(self.layer)}</b>: SQNR {self.sqnr:.1f} dB. {escape(self.cause)}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )

    def _repr_html_(self) -> str:
        return self.to_html() + f"<ol>{''.join(f'<li>{fix.to_html()}</li>' for fix in self.fixes)}</ol>"


def diagnose(
    sim: QuantSim,
    layer: str,
    batches: Sequence[Any],
    progress: Progress | None = None,
    max_bytes: int = 1 << 30,
    tries: bool = True,
) -> Diagnosis:
    """The diagnosis of `layer` on `batches` in the present state of `sim`, which is not changed.

    tries: try fixes, each from the layer that it changes; without, none is offered. Raises UnknownLayer, NotCalibrated,
    and InputError where nothing of the layer is quantized.
    """
    progress = progress or Silent()
    data = list(batches)
    if not data:
        raise InputError("a diagnosis needs at least one batch; there was none.")
    require_calibrated(sim)
    group = Group.of(shadow(sim), layer)
    parts, sqnr = decompose(group.sim, group, data, progress)
    shares = dict(zip(parts.part, parts.share, strict=True))
    before = None
    if shares["inherited"] == parts.share.max() and shares["inherited"] > 0:
        before = _worst_before(shadow(sim), Group.of(sim, layer), data[0])
    causes = causes_of(group, parts, before)
    fixes: list[Fix] = []
    before_fixes = None
    if tries and causes:
        trials = Trials(sim, data, max_bytes)
        fixes, before_fixes = trials.tried(possible_fixes(group, shares), progress), trials.before
    names = tuple(step.name for step in group.layers)
    return Diagnosis(layer, names, sqnr, parts, tuple(causes), tuple(filter(_helps, fixes)), before_fixes)


def _bar(share: float) -> str:
    """The style of a cell that is filled to `share`."""
    percent = 100 * min(max(share, 0.0), 1.0)
    return f"background:linear-gradient(to right, rgba(213,94,0,.3) {percent:.1f}%, transparent 0)"


def _helps(fix: Fix) -> bool:
    """Whether the gain is more than its own error."""
    return fix.predicted_gain > max(0.0 if math.isnan(fix.gain_error) else fix.gain_error, 0.0)


@torch.no_grad()
def _worst_before(sim: QuantSim, group: Group, batch: Any) -> tuple[str, float] | None:
    """The unit before `group` without which its error shrinks most, of the five that add most noise themselves, and the
    share that would be gone. Changes `sim`."""
    before, graph = set(group.outside), sim.graph
    for step in reversed(graph.layers):
        if step.index in before:
            before |= {source.index for source in step.inputs}
    noise = layer_noise(sim, [batch])
    noisy = noise[[graph[name].index in before for name in noise.layer]].nsmallest(5, "own_sqnr")
    units = [unit for unit in units_of(sim) if set(unit.layers) & set(noisy.layer)]
    flat, last = sim.inputs(batch), group.last.index
    wanted = _value(sim, call_layer, flat, last)

    def error() -> float:
        return float((_value(sim, sim.call, flat, last) - wanted).double().square().sum())

    whole, found = error(), []
    for unit in units:
        if any(layer.name in unit.layers for layer in group.layers):
            continue
        for key in unit.quantizers:
            sim.quantizers[key].enabled = False
        found.append((unit.layer, 1 - error() / whole if whole else 0.0))
        for key in unit.quantizers:
            sim.quantizers[key].enabled = True
    best = max(found, key=lambda pair: pair[1], default=None)
    return best if best is not None and best[1] > 0 else None


def _value(sim: QuantSim, call: Call, flat: list[Any], index: int) -> Tensor:
    """The value of one layer; nothing after it is run."""
    replay = Replay(sim.graph, [flat], call, lambda layer: None, keeps=lambda layer: False)
    return replay.value(0, sim.graph.layers[index].name)
