"""What makes a layer hard to quantize, read off its weights and its statistics and said in a sentence."""

import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from qlab.analysis.decomposition import clipped
from qlab.analysis.distributions import channel_bounds
from qlab.analysis.group import Group
from qlab.quantization import Quantizer, Scheme, WeightQuantizer
from qlab.sim import QuantSim

LITTLE = 0.02  # a share of the error not worth a word where most of it was inherited
OUTLIER = 4.0  # a channel so many times as wide as the median one stands out
SPREAD = 8.0  # ranges that differ so much cost the narrowest channel three bits
TAIL = 2.0  # a range so many times that of 99.9 % of the values is stretched by the rest
NORMS = ("layer_norm", "rms_norm", "group_norm")


def causes_of(group: Group, parts: pd.DataFrame, before: tuple[str, float] | None = None) -> list[tuple[str, str]]:
    """(part, sentence) of what the layer inherited, where that costs most, and of the worst that it adds itself.

    before: the earlier layer that matters most, and how much of the error would be gone if it stayed float.
    """
    shares = parts.set_index("part").share
    own = shares.drop("inherited")
    found = []
    if shares["inherited"] > own.max():
        blame = f"; {before[1]:.0%} would be gone with {before[0]!r} in float" if before else ""
        found.append(("inherited", f"{shares['inherited']:.0%} of the error comes in with the inputs{blame}."))
    worst = str(own.idxmax())
    if own[worst] > (LITTLE if found else 0):
        found.append((worst, f"{own[worst]:.0%} of the error is {_of_part(group, worst)}."))
    return found


def outlier_channels(widths: Tensor, times: float = OUTLIER) -> list[int]:
    """The channels (at most a tenth of them) that are `times` as wide as the median one, the widest first."""
    alive = widths[widths > 0]
    if len(alive) < 3:
        return []
    found = (widths > times * alive.median()).nonzero().squeeze(1)
    return (
        sorted(found.tolist(), key=lambda c: -float(widths[c])) if 0 < len(found) <= max(len(widths) // 10, 1) else []
    )


def range_spread(widths: Tensor) -> float:
    """Widest over narrowest channel range, channels of range 0 left out; 1 where nothing differs."""
    alive = widths[widths > 0]
    return float(alive.max() / alive.min()) if len(alive) else 1.0


def tail_factor(quantizer: Quantizer) -> float:
    """The range seen over the range of 99.9 % of the values."""
    if isinstance(quantizer, WeightQuantizer):
        values = quantizer.weight.detach().abs().reshape(-1).float().cpu()
        if values.numel() < 1000:
            return 1.0
        inner = float(values.kthvalue(math.ceil(0.999 * values.numel())).values)
        return float(values.max()) / inner if inner else 1.0
    if quantizer.statistics.is_empty:
        return 1.0
    sample = quantizer.statistics.sample()
    order = sample.values[0].abs().argsort()
    reached = sample.counts[0][order].double().cumsum(0)
    inner = float(sample.values[0].abs()[order][torch.searchsorted(reached, 0.999 * float(reached[-1]))])
    largest = max(abs(float(sample.minimum[0])), abs(float(sample.maximum[0])))
    return largest / inner if inner else 1.0


def _of_part(group: Group, part: str) -> str:
    if part == "bias":
        return "the bias, on its int32 grid or corrected"
    what, verb = part.split()
    quantizer = group.weight if what == "weight" else group.output
    assert quantizer is not None
    sentence = _of_clipping(quantizer) if verb == "clipping" else _of_rounding(group, quantizer)
    return f"the {verb} of the {what}: {sentence}"


def _of_rounding(group: Group, quantizer: Quantizer) -> str:
    is_weight = isinstance(quantizer, WeightQuantizer)
    layer = group.weighted if is_weight else group.last
    assert layer is not None
    whole = quantizer.granularity.kind == "per_tensor"
    if is_weight or not quantizer.statistics.is_empty:
        low, high = channel_bounds(quantizer)
        widths = torch.maximum(low.abs(), high.abs())
        outliers = outlier_channels(widths) if whole else []
        if outliers and not is_weight and (layer.kind in NORMS or _is_residual(group.sim, layer.name)):
            source = "LayerNorm" if layer.kind in NORMS else "residual"
            return f"{source} outlier dimensions {_listed(outliers)} {_reach(widths, outliers)}"
        if outliers:
            name = "outlier channel" if len(outliers) == 1 else "outlier channels"
            return f"{name} {_listed(outliers)} {_reach(widths, outliers)}"
        if whole and is_weight and (spread := range_spread(widths)) > SPREAD:
            kind = "depthwise channels" if layer.kind == "depthwise_conv" else "channels"
            step = float(quantizer.required_encoding().scale.max())
            narrowest = float(widths[widths > 0].min()) / step
            return f"range spread of {kind} {_times(spread)}x; the narrowest channel gets {narrowest:.2g} steps a side"
    if (factor := tail_factor(quantizer)) > TAIL:
        stretched = "" if layer.kind not in ("relu6", "clip") else "ReLU6 range: it fills [0, 6] though "
        return f"{stretched}0.1 % of the values stretch the range {factor:.2g} times"
    if layer.kind in ("relu6", "clip") and not is_weight:
        return "ReLU6 range: the grid spans it whole, and factors of cross-layer equalization do not pass"
    if not is_weight and quantizer.scheme is not Scheme.ASYMMETRIC and _is_one_sided(quantizer):
        return "a symmetric grid for values of one sign leaves half of the levels unused"
    encoding = quantizer.required_encoding()
    return f"no channel and no value stands out, {encoding.qmax - encoding.qmin + 1} levels are simply few"


def _of_clipping(quantizer: Quantizer) -> str:
    encoding = quantizer.required_encoding()
    if isinstance(quantizer, WeightQuantizer):
        share = float(clipped(quantizer.weight.detach(), encoding).double().mean())
    elif quantizer.statistics.is_empty or encoding.scale.dim():
        return f"the {quantizer.rule} range leaves values outside"
    else:
        sample = quantizer.statistics.sample()
        outside = clipped(sample.values[0], encoding.to("cpu"))
        share = float(sample.counts[0][outside].sum() / sample.counts[0].sum())
        if not share:
            return "values are beyond all that calibration saw: calibrate on data like these"
    return f"clipped tails, the {quantizer.rule} range leaves {share:.2%} of the values outside"


def _is_residual(sim: QuantSim, name: str) -> bool:
    """Whether an addition feeds a normalisation over channels, as the residual stream of a transformer does."""
    layer = sim.graph[name]
    return layer.kind == "add" and any(user.kind in NORMS for user in layer.users)


def _is_one_sided(quantizer: Quantizer) -> bool:
    low, high = channel_bounds(quantizer)
    return float(low.min()) >= 0 or float(high.max()) <= 0


def _reach(widths: Tensor, outliers: Sequence[int]) -> str:
    times = float(widths[outliers[0]] / widths[widths > 0].median())
    return f"{'reaches' if len(outliers) == 1 else 'reach'} {_times(times)} times as far as the median channel"


def _times(value: float) -> str:
    """A ratio to read: two digits, all digits of large ones.

    >>> [_times(value) for value in (4.26, 37.2, 480.4, 18_900.0)]
    ['4.3', '37', '480', '18,900']
    """
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _listed(channels: Sequence[int]) -> str:
    return ", ".join(map(str, channels[:4])) + (", ..." if len(channels) > 4 else "")
