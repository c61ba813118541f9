"""The noise in each layer's output against the float model, one pass for all layers; inherited and own kept apart.

The reference measures only what has piled up by each layer. Here the float layer is also run on the inputs that it has
in the quantized model: the difference from there on is the layer's own doing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qlab.analysis.precision import jackknife
from qlab.graph import Layer, call_layer, fill
from qlab.progress import Progress, Silent
from qlab.sim import QuantSim, Role

NOISE_COLUMNS = ("layer", "kind", "sqnr", "sqnr_error", "mse", "mse_error", "own_sqnr", "own_sqnr_error", "own_mse")


@torch.no_grad()
def layer_noise(sim: QuantSim, batches: Sequence[Any], progress: Progress | None = None) -> pd.DataFrame:
    """One row a layer whose output is quantized: noise against the float model, and the part that is its own.

    Columns: layer, kind, sqnr [dB], mse, own_sqnr, own_mse, and standard errors over samples. `sim` runs in its present
    state and is not changed.
    """
    sim.graph.require_edges("The noise of each layer")
    sums: dict[str, list[Tensor]] = {}
    with sim.evaluating():
        for number, batch in enumerate(batches):
            (progress or Silent()).step(number, len(batches), f"noise of layers, batch {number}")
            walk(sim, sim.inputs(batch), lambda layer, *values: _add(sums, layer, *values))
    return pd.DataFrame([_row(sim, name, torch.cat(own)) for name, own in sums.items()], columns=list(NOISE_COLUMNS))


def walk(sim: QuantSim, flat: Sequence[Any], seen: Callable[[Layer, Tensor, Tensor, Tensor], None]) -> None:
    """Runs the float model and the sim side by side on one batch, layer by layer, each value freed after its last use.

    seen(layer, y, y_local, y_quantized) for every layer with an output quantizer of its own: its value in the float
    model, in float on the inputs that it has in the sim (fused layers before it in float as well), and in the sim.
    """
    graph = sim.graph
    left = [len(layer.users) for layer in graph]
    values: list[list[Any]] = [[None] * len(graph) for _ in range(3)]  # in float, what a layer sees locally, in the sim
    inputs = iter(flat)
    for layer in graph:
        index, role = layer.index, sim.placed[layer.name].role
        if layer.kind == "input":
            y = local = next(inputs)
            quantized = sim.call(layer, (y,), {})
        else:
            sides = [(fill(layer.args, side), fill(layer.kwargs, side)) for side in values]
            y, local = (call_layer(layer, *side) for side in sides[:2])
            quantized = sim.call(layer, *sides[2])
        # A group computed as one is float inside; at its border the sim's value goes in.
        border = local if role is Role.FUSED else quantized
        for side, value in zip(values, (y, border, quantized), strict=True):
            side[index] = value
        if role is Role.QUANTIZED and layer.is_float:
            seen(layer, y, local, quantized)
        for source in layer.inputs:
            left[source.index] -= 1
            if not left[source.index]:
                for side in values:
                    side[source.index] = None


def _add(sums: dict[str, list[Tensor]], layer: Layer, y: Tensor, local: Tensor, quantized: Tensor) -> None:
    samples = y.shape[0] if y.dim() else 1

    def total(value: Tensor) -> Tensor:
        return value.double().square().reshape(samples, -1).sum(1)

    elements = torch.full((samples,), y.numel() / max(samples, 1), dtype=torch.float64, device=y.device)
    rows = torch.stack([total(y), total(quantized - y), total(quantized - local), elements], 1)
    sums.setdefault(layer.name, []).append(rows.cpu())


def _row(sim: QuantSim, name: str, rows: Tensor) -> dict[str, Any]:
    def sqnr(column: int) -> Callable[[Tensor], Tensor]:
        return lambda sums: torch.where(
            sums[..., column] == 0, math.inf, 10 * torch.log10(sums[..., 0] / sums[..., column])
        )

    mse, mse_error = jackknife(lambda sums: sums[..., 1] / sums[..., 3], rows)
    total, own = jackknife(sqnr(1), rows), jackknife(sqnr(2), rows)
    own_mse = float(rows[:, 2].sum() / rows[:, 3].sum())
    found = (name, sim.graph[name].title, *total, mse, mse_error, *own, own_mse)
    return dict(zip(NOISE_COLUMNS, found, strict=True))
