"""Ranges per channel and histograms of every weight and output, from what calibration saw: no pass over data."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qlab.analysis.shadow import quantizers_of
from qlab.quantization import Encoding, Quantizer, WeightQuantizer
from qlab.sim import QuantSim

RANGE_COLUMNS = ("layer", "part", "channel", "min", "max", "grid_min", "grid_max")
HISTOGRAM_COLUMNS = ("layer", "part", "left", "right", "count")


def channel_ranges(sim: QuantSim) -> pd.DataFrame:
    """One row for each channel of each weight and output: the range of its values and of its grid.

    Columns: layer, part ('weight' or 'output'), channel (0 where there are none), min, max, grid_min, grid_max (NaN
    where there is no grid). Outputs that saw no data are left out.
    """
    frames = []
    for quantizer, part in tensors_of(sim):
        low, high = channel_bounds(quantizer)
        grid_low, grid_high = _grid(quantizer.encoding, len(low))
        frames.append(
            pd.DataFrame(
                {
                    "layer": quantizer.name,
                    "part": part,
                    "channel": np.arange(len(low)),
                    "min": low.double().numpy(),
                    "max": high.double().numpy(),
                    "grid_min": grid_low,
                    "grid_max": grid_high,
                }
            )
        )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(RANGE_COLUMNS))


def histograms(sim: QuantSim, bins: int = 128) -> pd.DataFrame:
    """One row for each bin of each weight and output: columns layer, part, left, right, count.

    Weights are counted exactly; outputs from the histogram that calibration kept.
    """
    frames = [
        histogram_frame(quantizer, bins).assign(layer=quantizer.name, part=part) for quantizer, part in tensors_of(sim)
    ]
    whole = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(HISTOGRAM_COLUMNS))
    return whole[list(HISTOGRAM_COLUMNS)]


def histogram_frame(quantizer: Quantizer, bins: int = 128) -> pd.DataFrame:
    """The values that one quantizer rounds, in equal bins: columns left, right, count."""
    if isinstance(quantizer, WeightQuantizer):
        values, counts = quantizer.weight.detach().cpu().reshape(-1).float().numpy(), None
    else:
        sample = quantizer.statistics.sample()
        filled = sample.counts[0] > 0
        values, counts = sample.values[0][filled].numpy(), sample.counts[0][filled].double().numpy()
    if not len(values):
        return pd.DataFrame({"left": [], "right": [], "count": []})
    count, edges = np.histogram(values, bins, weights=counts)
    return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": np.rint(count).astype(np.int64)})


def tensors_of(sim: QuantSim) -> Iterator[tuple[Quantizer, str]]:
    """(quantizer, 'weight' or 'output') of everything whose values are known, in order of execution."""
    order = {id(quantizer): number for number, quantizer in enumerate(quantizers_of(sim))}
    found = sorted(quantizers_of(sim), key=lambda q: (sim.graph[q.name].index, order[id(q)]))
    for quantizer in found:
        is_weight = isinstance(quantizer, WeightQuantizer)
        if is_weight or not quantizer.statistics.is_empty:
            yield quantizer, "weight" if is_weight else "output"


def channel_bounds(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """(minimum, maximum) [C] of the values that a quantizer rounds, on the CPU."""
    if isinstance(quantizer, WeightQuantizer):
        weight = quantizer.weight.detach()
        rows = weight.movedim(quantizer.axis or 0, 0).reshape(weight.shape[quantizer.axis or 0], -1)
        return rows.amin(1).cpu(), rows.amax(1).cpu()
    low, high = quantizer.statistics.minimum, quantizer.statistics.maximum
    assert low is not None
    assert high is not None
    return low, high


def _grid(encoding: Encoding | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
    if encoding is None:
        return np.full(channels, np.nan), np.full(channels, np.nan)
    sides = []
    for bound, widest in ((encoding.minimum, torch.amin), (encoding.maximum, torch.amax)):
        values = widest(bound, 1) if bound.dim() > 1 else bound.reshape(-1)
        sides.append(values.detach().cpu().double().expand(channels).numpy())
    return sides[0], sides[1]
