"""What a sim shows of itself: the table of quantizers, the coverage of steps, one line a layer, a table in Jupyter."""

import html as _html
import math
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from qlab.quantization import Encoding, Quantizer, Sample, WeightQuantizer
from qlab.sim.placement import Role

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim


def quantizer_table(sim: "QuantSim") -> pd.DataFrame:
    """One row a quantizer; scale, zero_point, minimum and maximum are those of the widest grid where there are many."""
    rows = []
    for name, entry in sim.placed.items():
        for part, quantizer in (("weight", entry.weight), ("output", entry.output)):
            if quantizer is None or (part == "output" and entry.role is not Role.QUANTIZED) or entry.carries_weight:
                continue
            encoding, spec = quantizer.encoding, quantizer.spec
            row = {
                "layer": name,
                "part": part,
                "kind": entry.layer.title,
                "bits": spec.bits,
                "scheme": spec.scheme.value,
                "granularity": str(spec.granularity),
                "rule": str(spec.rule),
                "enabled": quantizer.enabled,
                "frozen": quantizer.frozen,
                "grids": 0 if encoding is None else encoding.scale.numel(),
            }
            rows.append(row | _range(encoding) | {"sqnr": signal_to_noise(quantizer)})
    columns = ["layer", "part", "kind", "bits", "scheme", "granularity", "rule", "enabled", "frozen", "grids"]
    return pd.DataFrame(rows, columns=[*columns, "scale", "zero_point", "minimum", "maximum", "sqnr"])


def coverage_table(sim: "QuantSim") -> pd.DataFrame:
    """One row a step that produces a tensor: its role, on whose grid it lies, and why; bits where it has a grid."""
    rows = []
    for name, entry in sim.placed.items():
        layer = entry.layer
        if layer.dtype is None and layer.kind not in ("lstm", "gru", "rnn", "split"):
            continue
        on = entry.output.name if entry.output is not None else ""
        off = entry.output is not None and not entry.output.enabled
        rows.append(
            {
                "layer": name,
                "kind": layer.title,
                "role": entry.role.value,
                "grid": on,
                "bits": entry.output.bits if entry.output is not None and not off else None,
                "weight_bits": entry.weight.bits if entry.weight is not None and entry.weight.enabled else None,
                "reason": "its quantizer is switched off" if off else entry.reason,
                "location": layer.location,
            }
        )
    return pd.DataFrame(rows).astype({"bits": "Int64", "weight_bits": "Int64"})


def signal_to_noise(quantizer: Quantizer) -> float:
    """Signal to quantization noise of the quantizer's own tensor in dB: exact for weights, of the histogram else.

    NaN where there are no statistics, infinity where nothing is lost.
    """
    encoding = quantizer.encoding
    if encoding is None:
        return math.nan
    with torch.no_grad():
        if isinstance(quantizer, WeightQuantizer):
            weight = quantizer.weight.detach().double()
            enabled = quantizer.quantized() if quantizer.enabled else weight
            noise, signal = float((weight - enabled.double()).square().sum()), float(weight.square().sum())
        elif quantizer.statistics.is_empty:
            return math.nan
        else:
            sample = quantizer.statistics.sample()
            signal = float((sample.values.double().square() * sample.counts).sum() / sample.counts.sum())
            noise = noise_on_grid(sample, encoding)
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def noise_on_grid(sample: Sample, encoding: Encoding) -> float:
    """The mean squared error of a one-row sample on a grid; with many grids, on the mean of their squared steps."""
    if encoding.scale.dim() == 0:
        levels = torch.round(sample.values / encoding.scale.cpu()) + encoding.zero_point.cpu()
        kept = levels.clamp(encoding.qmin, encoding.qmax)
        squared = ((kept - encoding.zero_point.cpu()) * encoding.scale.cpu() - sample.values).square()
        fine = bool(encoding.scale.cpu() < 2 * sample.bin_width) & (levels == kept)
        step = encoding.scale.cpu().square() / 12
        squared = torch.where(fine, step.expand_as(squared), squared)
        return float((squared.double() * sample.counts).sum() / sample.counts.sum().clamp_min(1))
    return float(encoding.scale.double().square().mean() / 12)


def text(sim: "QuantSim") -> str:
    """One line a layer that holds a quantizer, and a summary line."""
    lines = [summary(sim)]
    width = min(max((len(name) for name in sim.placed), default=0), 48)
    for name, entry in sim.placed.items():
        own = entry.output if entry.role is Role.QUANTIZED else None
        if (entry.weight is None or entry.carries_weight) and own is None:
            continue
        weight = "" if entry.weight is None else _short(entry.weight)
        output = _short(own) if own is not None else f"({entry.reason or entry.role.value})"
        lines.append(f"  {name:{width}}  {entry.layer.title:22}  {weight:24}  {output}")
    return "\n".join(lines)


def summary(sim: "QuantSim") -> str:
    """One line: how many layers and quantizers, and whether they are calibrated."""
    quantizers = [q for q in sim.quantizers.values() if isinstance(q, Quantizer)]
    missing = sum(q.encoding is None for q in quantizers)
    whole = ", module by module as it could not be captured" if sim.graph.runs_whole else ""
    state = "calibrated" if not missing else f"{missing} quantizers not calibrated: run sim.calibrate(batches)"
    return f"QuantSim({sim.preset.name}, {len(sim.graph)} steps, {len(quantizers)} quantizers, {state}{whole})"


def html(sim: "QuantSim") -> str:
    """A table of quantizers for Jupyter, every name escaped; long models are cut after 40 rows."""
    frame = quantizer_table(sim)
    shown = frame.head(40)[["layer", "kind", "part", "bits", "scheme", "granularity", "rule", "enabled", "sqnr"]]
    head = "".join(f"<th>{_html.escape(c)}</th>" for c in shown.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_html.escape(_cell(value))}</td>" for value in row) + "</tr>"
        for row in shown.itertuples(index=False)
    )
    more = f"<p>{len(frame) - 40} more rows in sim.to_pandas()</p>" if len(frame) > 40 else ""
    caption = f"<caption>{_html.escape(summary(sim))}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _short(quantizer: Quantizer) -> str:
    spec = quantizer.spec
    parts = [f"{spec.bits} bit", "" if str(spec.granularity) == "per_tensor" else str(spec.granularity)]
    parts += ["" if str(spec.rule) == "min_max" else str(spec.rule), "" if quantizer.enabled else "off"]
    return " ".join(part for part in parts if part)


def _range(encoding: Encoding | None) -> dict[str, float]:
    if encoding is None:
        return dict.fromkeys(("scale", "zero_point", "minimum", "maximum"), math.nan)
    widest = int(encoding.scale.reshape(-1).argmax())

    def pick(values: Tensor) -> float:
        return float(values.reshape(-1)[widest])

    return {
        "scale": pick(encoding.scale),
        "zero_point": pick(encoding.zero_point),
        "minimum": float(encoding.minimum.min()),
        "maximum": float(encoding.maximum.max()),
    }


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
