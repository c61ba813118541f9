"""Analysis: what QuantAnalyzer found, as tables; figures, reports and diagnoses come from it."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qlab.analysis.bits import Bits
from qlab.analysis.estimate import estimate_of
from qlab.analysis.freshness import Fingerprint
from qlab.analysis.precision import spearman
from qlab.analysis.sweep import Work
from qlab.analysis.units import Unit
from qlab.errors import InputError, UnknownLayer, nearest
from qlab.progress import Progress
from qlab.sim import QuantSim

if TYPE_CHECKING:
    from qlab.analysis.diagnosis import Diagnosis

EARLIER = "of an earlier state"
_KEY = ["layer", "part", "mode", "bits"]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was measured of one sim; a value, the sim may change meanwhile.

    score_name, score_unit: of the column `score`. units: what one row stands for. bits: the widths tried, as text.
    summary, enabled, disabled: columns of `Row`; `enabled` has only this layer quantized (change: against float),
    `disabled` all but this one (change: against all quantized). noise: see `layer_noise`, with `unit`, the row of the
    other tables. ranges, histograms, estimate: see `channel_ranges`, `histograms`, `estimate_sensitivity`.
    work: done by the sweeps, and brute_force: had every case been a full run. samples: behind the scores. fingerprint:
    what the numbers depend on, see `changed_units`.
    """

    score_name: str
    score_unit: str
    units: tuple[Unit, ...]
    bits: tuple[str, ...]
    summary: pd.DataFrame
    enabled: pd.DataFrame
    disabled: pd.DataFrame
    noise: pd.DataFrame
    ranges: pd.DataFrame
    histograms: pd.DataFrame
    estimate: pd.DataFrame
    work: Work
    brute_force: Work
    samples: int
    seconds: float
    notes: tuple[str, ...] = ()
    fingerprint: Fingerprint = field(default_factory=Fingerprint, repr=False)
    sim: QuantSim | None = field(default=None, repr=False)
    batches: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def weights_only(self) -> pd.DataFrame:
        """The scores with weights alone quantized, one row a width."""
        return self._summary("weights only")

    @property
    def activations_only(self) -> pd.DataFrame:
        """The scores with activations alone quantized, one row a width."""
        return self._summary("activations only")

    @property
    def correlation(self) -> pd.DataFrame:
        """Spearman's rank correlation of the estimate with what was measured with only this layer quantized.

        One row for each width and pair: columns bits, estimate, measured, spearman, layers. 1 is the same order. Where
        the score has other samples than the estimate, these count too: a KL that few unsure samples make ranks layers
        differently on others, measured exactly as well.
        """
        rows = []
        for bits in self.bits:
            table = self.enabled[self.enabled.bits == bits]
            units = {(unit.layer, unit.part): unit for unit in self.units}
            known = [units[key] for key in zip(table.layer, table.part, strict=True)]
            found = [estimate_of(self.estimate, unit.tensors, Bits.of(bits)) for unit in known]
            kl, mse = (np.array([pair[i] for pair in found], dtype=float) for i in (0, 1))
            # the loss that is measured: larger is worse, as in the estimate
            losses = {"kl": table.kl, "sqnr": -table.sqnr, self.score_name: -table.score}
            for name, estimated, measured in (
                ("kl", kl, "kl"),
                ("sqnr", mse, "sqnr"),
                ("kl", kl, self.score_name),
                ("sqnr", mse, self.score_name),
            ):
                value = spearman(estimated, losses[measured].to_numpy(dtype=float))
                rows.append((bits, name, measured, value, len(table)))
        frame = pd.DataFrame(rows, columns=["bits", "estimate", "measured", "spearman", "layers"])
        return frame.drop_duplicates(["bits", "estimate", "measured"], ignore_index=True)

    def ranking(self, mode: str = "enabled", bits: Any = None) -> list[str]:
        """The rows' layers, the one to blame most first; equal scores are ordered by the SQNR of the result.

        'enabled': least score when it alone is quantized; 'disabled': greatest score when it alone is not.
        """
        table = self.table(mode)
        width = self.bits[0] if bits is None else str(Bits.of(bits))
        rows = table[table.bits == width].dropna(subset=["score"])
        return list(rows.sort_values(["score", "sqnr"], ascending=mode == "enabled", kind="stable").layer)

    def table(self, mode: str) -> pd.DataFrame:
        """The table `enabled` or `disabled`."""
        if mode not in ("enabled", "disabled"):
            raise InputError(f"mode must be 'enabled' or 'disabled'; got {mode!r}.")
        return self.enabled if mode == "enabled" else self.disabled

    def changed_units(self, sim: QuantSim) -> list[Unit]:
        """The rows whose layers `sim` quantizes otherwise than when they were measured; all after a change of weights.

        `QuantAnalyzer.update` measures them again.
        """
        return self.fingerprint.changed(sim, self.units)

    def updated(self, other: "Analysis") -> "Analysis":
        """This analysis with the rows that `other` measured anew, after an edit of some layers.

        With only one layer quantized, other layers' rows stay valid. With all but one they do not, and say so in their
        note, as do rows of the summary; the estimate loses the layers that were measured anew.
        """
        changed = {
            name: _merged(getattr(self, name), getattr(other, name)) for name in ("enabled", "disabled", "summary")
        }
        estimate = other.estimate
        if not len(estimate):
            anew = {layer for unit in other.units for layer in unit.layers}
            estimate = self.estimate[~self.estimate.layer.isin(anew)].reset_index(drop=True)
        units = tuple({(unit.layer, unit.part): unit for unit in (*self.units, *other.units)}.values())
        fingerprint = self.fingerprint.updated(other.fingerprint)
        return dataclasses.replace(other, **changed, units=units, estimate=estimate, fingerprint=fingerprint)

    def switched_off(self, units: Sequence[Unit], fingerprint: Fingerprint) -> "Analysis":
        """This analysis after `units` were switched off: their rows have no number, and say so."""
        gone = {(unit.layer, unit.part) for unit in units}
        is_gone = [key in gone for key in zip(self.enabled.layer, self.enabled.part, strict=True)]
        enabled = self.enabled.copy()
        enabled.loc[is_gone, [name for name in enabled.columns if enabled[name].dtype == float]] = math.nan
        enabled.loc[is_gone, "note"] = "switched off"
        earlier = {name: _merged(getattr(self, name), getattr(self, name).iloc[:0]) for name in ("disabled", "summary")}
        return dataclasses.replace(self, enabled=enabled, fingerprint=self.fingerprint.updated(fingerprint), **earlier)

    def unit_of(self, layer: str) -> Unit:
        """The row that a layer belongs to; raises UnknownLayer."""
        for unit in self.units:
            if layer in unit.layers:
                return unit
        names = [name for unit in self.units for name in unit.layers]
        raise UnknownLayer(f"the analysis has no layer {layer!r}. {nearest(layer, names)}")

    def diagnose(
        self,
        layer: str,
        sim: QuantSim | None = None,
        batches: Sequence[Any] | None = None,
        progress: Progress | None = None,
    ) -> "Diagnosis":
        """Why `layer` loses what it loses, and what would help; of `sim` (the analysed one) as it is now."""
        from qlab.analysis.diagnosis import diagnose

        sim = sim or self.sim
        if sim is None:
            raise InputError("this analysis has no sim with it: analysis.diagnose(layer, sim=sim, batches=batches).")
        return diagnose(sim, layer, list(self.batches if batches is None else batches), progress)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained page that opens offline, and its tables beside it as .json; returns the page.

        Raises OSError, with what to do, where the folder is missing or cannot be written; the analysis stays.
        """
        from qlab.analysis.report import save_report

        return save_report(self, Path(path))

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Writes AIMET's files (per_layer_quant_enabled.json, ...) to `folder`, all or none; returns it."""
        from qlab.analysis.aimet_files import export_files

        return export_files(self, Path(folder))

    def plot(self, what: str = "enabled", **options: Any) -> Any:
        """A figure (qlab.plots.Plot): 'enabled', 'disabled', 'summary', 'noise', 'estimate', 'ranges' (relative, by
        layer), or 'histogram' and 'channels' with layer= and part=."""
        from qlab.analysis.pictures import picture_of

        return picture_of(self, what, **options)

    def __repr__(self) -> str:
        lines = [self._headline()]
        for mode, title in (("enabled", "most sensitive alone"), ("disabled", "most gained by leaving it float")):
            if len(self.table(mode)):
                lines.append(f"  {title}: {', '.join(self.ranking(mode)[:5])}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        from html import escape

        parts = [f"<p>{escape(self._headline())}</p>"]
        columns = ["layer", "bits", "score", "error", "change", "change_error", "sqnr", "kl", "note"]
        for mode in ("enabled", "disabled"):
            table = self.table(mode)
            if len(table):
                order = {name: i for i, name in enumerate(self.ranking(mode))}
                shown = table.iloc[np.argsort([order.get(name, len(order)) for name in table.layer], kind="stable")]
                html = shown[columns].head(20).to_html(index=False, float_format=lambda v: f"{v:.4g}", border=0)
                parts.append(f"<details open><summary>{mode}</summary>{html}</details>")  # pandas escapes cells
        return "".join(parts + [f"<p>{escape(note)}</p>" for note in self.notes])

    def _headline(self) -> str:
        def score(mode: str) -> str:
            rows = self._summary(mode)
            return " / ".join(f"{value:.4g}" for value in rows.score) or "-"

        saved = f", {self.work.forwards:.1f} forwards for {self.brute_force.forwards:.0f} runs"
        return (
            f"Analysis({len(self.units)} layers at {', '.join(self.bits)} bits; {self.score_name}: float "
            f"{score('float')}, weights only {score('weights only')}, activations only {score('activations only')}, "
            f"both {score('both')}; {self.samples} samples, {self.seconds:.1f} s{saved})"
        )

    def _summary(self, mode: str) -> pd.DataFrame:
        return self.summary[self.summary["mode"] == mode].reset_index(drop=True)


def _merged(rows: pd.DataFrame, anew: pd.DataFrame) -> pd.DataFrame:
    """`rows` with those of `anew` in their place; others that an edit made old say so."""
    old = rows["mode"].isin(["disabled", "both", "weights only", "activations only"]) & (rows.note == "")
    both = pd.concat([rows.assign(note=rows.note.mask(old, EARLIER)), anew]) if len(rows) else anew
    return _in_order(both.drop_duplicates(_KEY, keep="last"), rows)


def _in_order(rows: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    """`rows` in the order of `like`, new ones last."""
    known = {tuple(key): i for i, key in enumerate(like[_KEY].itertuples(index=False))}
    places = [known.get(tuple(key), len(known)) for key in rows[_KEY].itertuples(index=False)]
    return rows.iloc[np.argsort(places, kind="stable")].reset_index(drop=True)
