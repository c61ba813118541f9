"""The error of one layer's output, taken apart: what it inherited, and what weight and output add by rounding and
clipping."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qlab.analysis.group import Group
from qlab.analysis.precision import jackknife
from qlab.graph import Layer, call_layer
from qlab.progress import Progress, Silent
from qlab.quantization import Encoding
from qlab.sim import QuantSim

PARTS = ("inherited", "weight rounding", "weight clipping", "bias", "output rounding", "output clipping")
PART_COLUMNS = ("part", "share", "share_error", "mse", "sqnr")


@torch.no_grad()
def decompose(
    sim: QuantSim, group: Group, batches: Sequence[Any], progress: Progress | None = None
) -> tuple[pd.DataFrame, float]:
    """One row for each of PARTS, and the SQNR of the group's output in dB.

    The output moves from its float value to its value in the sim in six steps, one a part, so that the parts add up
    exactly. Columns: part, share = <part, error> / |error|^2 (the shares add up to 1; one below 0 takes error away),
    its standard error over samples, and the part's own mse and sqnr. 'bias' is what int32 biases and bias correction
    do. `sim` is not changed.
    """
    rows = []
    with sim.evaluating():
        for number, batch in enumerate(batches):
            (progress or Silent()).step(number, len(batches), f"{group.last.name}, batch {number}")
            rows.append(_rows(group, *_values(sim, group, sim.inputs(batch))))
    whole = torch.cat(rows)  # [samples, 2 * parts + 3]: products, energies, error, signal, elements
    total = whole.sum(0)
    number = len(PARTS)
    error, signal, elements = (float(value) for value in total[2 * number :])
    table = []
    for i, part in enumerate(PARTS):
        share, spread = jackknife(partial(_ratio, i, 2 * number), whole) if error else (0.0, math.nan)
        energy = float(total[number + i])
        table.append((part, share, spread, energy / elements, _decibel(signal, energy)))
    return pd.DataFrame(table, columns=list(PART_COLUMNS)), _decibel(signal, error)


def clipped(values: Tensor, encoding: Encoding) -> Tensor:
    """Which values lie beyond the outermost levels by more than half a step: boolean, shaped as `values`."""
    scale, zero_point = encoding.broadcast(values.shape)
    levels = torch.round(values / scale) + zero_point
    return (levels < encoding.qmin) | (levels > encoding.qmax)


def _values(sim: QuantSim, group: Group, flat: list[Any]) -> tuple[Tensor, list[Any]]:
    """(the group's output in the float model, the values that go in in the sim, by index)."""
    wanted: dict[int, Any] = {}
    outside: list[Any] = [None] * len(sim.graph)

    def of_float(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = call_layer(layer, args, kwargs)
        if layer is group.last:
            wanted[0] = value
        return value

    def of_sim(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = sim.call(layer, args, kwargs)
        if layer.index in group.outside:
            outside[layer.index] = args[0] if layer is group.last else value
        return value

    sim.graph.run(flat, of_float)
    sim.graph.run(flat, of_sim)
    return wanted[0], outside


def _rows(group: Group, y: Tensor, outside: list[Any]) -> Tensor:
    steps = [y]
    quantizer = group.weight
    if quantizer is None:
        steps += [group.run(outside, None)] * 3
    else:
        weight, rounded = quantizer.weight.detach(), quantizer.quantized().detach()
        beyond = (
            clipped(weight, quantizer.required_encoding()) if quantizer.enabled else torch.zeros_like(weight).bool()
        )
        for used in (weight, torch.where(beyond, weight, rounded), rounded):
            steps.append(group.run(outside, used))
    steps.append(group.run_quantized(outside))
    output = group.output
    if output is None or not output.enabled:
        steps += [steps[-1]] * 2
    else:
        value, encoding = steps[-1], output.required_encoding()
        final = output(value)
        steps += [torch.where(clipped(value, encoding), value, final), final]
    samples = y.shape[0] if y.dim() else 1

    def by_sample(product: Tensor) -> Tensor:
        return product.double().reshape(samples, -1).sum(1)

    parts = [after.double() - before.double() for before, after in pairwise(steps)]
    error = steps[-1].double() - y.double()
    columns = [by_sample(part * error) for part in parts] + [by_sample(part * part) for part in parts]
    elements = torch.full((samples,), y.numel() / samples, dtype=torch.float64, device=y.device)
    return torch.stack([*columns, by_sample(error * error), by_sample(y.double().square()), elements], 1).cpu()


def _ratio(part: int, whole: int, sums: Tensor) -> Tensor:
    return sums[..., part] / sums[..., whole]


def _decibel(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
