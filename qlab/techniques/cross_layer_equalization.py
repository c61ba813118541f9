"""Cross-layer equalization: channels of consecutive layers are rescaled until all of them use the whole grid.

ReLU lets positive factors pass, so a channel may be divided by a factor in one layer and multiplied by it in the next
without changing the float function. Where one grid serves a whole weight, small channels gain bits for nothing.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlab.graph import FoldedNorm, Layer
from qlab.graph.kernel import Kernel
from qlab.graph.patterns import Link, links, runs
from qlab.progress import Progress
from qlab.settings import setting
from qlab.sim import QuantSim
from qlab.sim.batches import Batches
from qlab.techniques.batch_norm_folding import BatchNormFolding
from qlab.techniques.float_function import FloatFunction, described
from qlab.techniques.stale_ranges import renew_ranges
from qlab.techniques.technique import Report, Technique
from qlab.techniques.weight_grid import scale_weight

_SETTLED = 1e-4  # factors of a sweep this close to 1 (as |log s|) end the iteration


@dataclass(frozen=True)
class CrossLayerEqualization(Technique):
    """Rescales channels between consecutive layers so that their ranges become equal.

    With r1_i = max|W1[i, :]| and r2_i = max|W2[:, i]|, channel i is divided by s_i = sqrt(r1_i / r2_i) in the first
    layer and multiplied by it in the second; through a depthwise convolution all three ranges become their geometric
    mean. Longer chains are swept until no factor moves. Pairs are found through ReLU, PReLU, LeakyReLU, identity,
    pooling and flatten; channels with a zero range, residual branches and results of the model are left alone.
    BatchNorm is folded first. ReLU6 bounds the values and stops the scaling, unless it is replaced by ReLU, which
    changes the float function: the report says by how much.

    absorb_bias: the part of a channel that ReLU always lets pass, c = max(0, beta - 3 |gamma|) of the folded BatchNorm,
    moves into the next layer's bias. The float result may move where a value lies more than 3 deviations below its
    mean. Skipped where the next layer pads with zeros: at the border c would be missing.

    When: per-tensor weights whose channels differ much (depthwise networks above all); before AdaRound and calibration.
    Cost: under a second, no data; with batches activation ranges are measured again and the change of the float result
    is reported, without them stale ranges are forgotten.

    Source: Nagel et al. 2019, arXiv:1906.04721.
    """

    needs_data: ClassVar[bool] = False

    fold: bool = setting(True, "fold BatchNorm first; a BatchNorm between two layers keeps them apart")
    replace_relu6: bool = setting(False, "replace ReLU6 between two layers by ReLU, so that factors pass")
    absorb_bias: bool = setting(True, "move what ReLU always lets pass into the next layer's bias")
    iterations: int = setting(100, "sweeps over all chains at most", minimum=1)

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: folds, rescales, absorbs."""
        function = FloatFunction(sim, batches) if batches is not None else None
        notes = self._fold(sim, batches, progress) if self.fold else []
        found, reasons = links(sim.graph)
        found, stale = self._without_relu6(sim, found, notes)
        if not found:
            notes += [_kept_apart(reasons)] if reasons else []
            return Report("CrossLayerEqualization", "no two layers to equalize", notes=tuple(notes))
        equalizer = _Equalizer(found)
        before = [equalizer.ranges(link) for link in found]
        sweeps = equalizer.sweep(self.iterations, progress)
        after = [equalizer.ranges(link) for link in found]
        notes += equalizer.apply(sim)
        rows = []
        for link, factors, old, new in zip(found, equalizer.factors, before, after, strict=True):
            absorbed, reason = _absorb(sim, link) if self.absorb_bias else (0, "")
            rows.append(_row(link, old, new, factors) | {"absorbed": absorbed})
            if reason and reason not in notes:
                notes.append(reason)
            if absorbed or bool((factors != 1).any()):
                stale += [link.first.layer, *link.between]
        notes += [note] if (note := renew_ranges(sim, stale, batches, progress)) else []
        notes += [_kept_apart(reasons)] if reasons else []
        moved = sum(row["largest_factor"] > 1 for row in rows)
        absorbed = sum(row["absorbed"] for row in rows)
        values: dict[str, Any] = {"pairs": len(found), "moved": moved, "sweeps": sweeps, "absorbed": absorbed}
        if function is None:
            notes.append("what became of the float result was not measured: give batches to apply for that.")
        change = described(function.change(), values) if function is not None else ""
        known = f" ({len(found) - moved} were equal already)" if moved < len(found) else ""
        summary = f"equalized {len(found)} pairs of layers in {sweeps} sweeps{known}{change}"
        return Report("CrossLayerEqualization", summary, tuple(rows), tuple(notes), values)

    def _fold(self, sim: QuantSim, batches: Batches | None, progress: Progress) -> list[str]:
        """Changes `sim`: folds BatchNorm; what to tell of it."""
        report = BatchNormFolding().run(sim, batches, None, progress)
        left = [f"{row['layer']} ({row['reason']})" for row in report.rows if not row["into"]]
        told = [f"BatchNorm that could not be folded keeps layers apart: {', '.join(left)}."] if left else []
        if report.values.get("folded"):
            told.insert(0, f"{report.values['folded']} BatchNorms were folded first.")
        return [*told, *report.notes]

    def _without_relu6(self, sim: QuantSim, found: list[Link], notes: list[str]) -> tuple[list[Link], list[Layer]]:
        """Changes `sim` where asked: replaces ReLU6. The links that factors pass, and the layers with other values."""
        clipped = [link for link in found if link.clipped]
        if clipped and not self.replace_relu6:
            notes.append(f"{len(clipped)} pairs are kept apart by ReLU6: replace_relu6=True equalizes them, too.")
            return [link for link in found if not link.clipped], []
        names = list(dict.fromkeys(layer.name for link in clipped for layer in link.clipped))
        if not names:
            return found, []
        kinds = {layer.name: layer.kind for layer in sim.graph}
        for name in names:
            if sim.graph[name].kind != "relu":  # a module called in several places is replaced in all of them
                sim.graph.replace_module(name, "relu")
        sim.changed()
        replaced = [layer.name for layer in sim.graph if layer.kind != kinds[layer.name]]
        notes.append(f"ReLU6 became ReLU, which changes the float function: {_first(replaced, ', ')}.")
        reached = sim.graph.downstream(replaced)
        return found, [layer for layer in sim.graph if layer.index in reached]


class _Equalizer:
    """Finds factors on the kernels' ranges alone; weights are multiplied once, at the end.

    factors[n] [C] is what link n divides by in its first kernel and multiplies by in its second.
    """

    def __init__(self, found: list[Link]) -> None:
        self._links = found
        self._runs = runs(found)
        self._numbers = {link.first.name: number for number, link in enumerate(found)}
        self._kernels: dict[str, Kernel] = {k.name: k for link in found for k in (link.first, link.second)}
        # Factors act on outputs and inputs: of the kernel's positions the largest weight is enough.
        self._largest = {name: kernel.grouped().abs().amax(3).cpu() for name, kernel in self._kernels.items()}
        self.factors = [torch.ones(link.first.outputs, dtype=torch.float64) for link in found]

    def ranges(self, link: Link) -> tuple[Tensor, Tensor]:
        """(largest |weight| of each output channel of the first kernel, of each input channel of the second)."""
        return self._output_range(link.first), self._input_range(link)

    def sweep(self, iterations: int, progress: Progress) -> int:
        """Equalizes all runs in turn until no factor moves; the number of sweeps."""
        sweeps = 0
        while sweeps < iterations:
            progress.step(sweeps, iterations, f"sweep {sweeps + 1}")
            sweeps += 1
            if max(self._equalize(run) for run in self._runs) < _SETTLED:
                break
        for factors in self.factors:
            if float(factors.log().abs().max()) < _SETTLED:
                factors.fill_(1)
        return sweeps

    def apply(self, sim: QuantSim) -> list[str]:
        """Changes `sim`: multiplies weights, biases and what is known of the values between; what to tell."""
        notes = []
        for kernel in self._kernels.values():
            outputs, inputs = (f.to(kernel.weight.device) for f in self._scales(kernel))
            if not bool((outputs != 1).any()) and not bool((inputs != 1).any()):
                continue
            if kernel.bias is not None:
                kernel.shift_bias(kernel.bias.detach().double() * (outputs - 1))
            notes.append(scale_weight(sim, kernel, outputs, inputs).note)
        for link, factors in zip(self._links, self.factors, strict=True):
            for layer in link.between:
                if (norm := sim.graph.folded.get(layer.name)) is not None:
                    divisor = factors.repeat_interleave(norm.mean.numel() // factors.numel()).to(norm.mean.device)
                    sim.graph.folded[layer.name] = FoldedNorm(norm.mean / divisor, norm.deviation / divisor)
        return [note for note in notes if note]

    def _equalize(self, run: list[Link]) -> float:
        """One step on one run: every range of a channel becomes their geometric mean. The largest |log factor|."""
        ranges = [self._output_range(run[0].first), *(self._input_range(link) for link in run)]
        logs = torch.stack(ranges).log()
        steps = (logs[:-1] - logs.mean(0)).cumsum(0)  # log s of each link
        steps = torch.where(torch.isfinite(logs).all(0), steps, 0.0)  # a dead channel keeps 1
        for link, step in zip(run, steps.exp(), strict=True):
            self.factors[self._numbers[link.first.name]] *= step
        return float(steps.abs().max())

    def _output_range(self, kernel: Kernel) -> Tensor:
        return self._scaled(kernel).amax(2).reshape(-1)

    def _input_range(self, link: Link) -> Tensor:
        return self._scaled(link.second).amax(1).reshape(-1, link.repeat).amax(1)

    def _scaled(self, kernel: Kernel) -> Tensor:
        outputs, inputs = self._scales(kernel)
        groups = kernel.form.groups
        return self._largest[kernel.name] * outputs.view(groups, -1, 1) * inputs.view(groups, 1, -1)

    def _scales(self, kernel: Kernel) -> tuple[Tensor, Tensor]:
        """What the present factors make of the kernel's output channels, and of its input channels."""
        outputs = torch.ones(kernel.outputs, dtype=torch.float64)
        inputs = torch.ones(kernel.inputs, dtype=torch.float64)
        for link, factors in zip(self._links, self.factors, strict=True):
            if link.first.name == kernel.name:
                outputs = 1 / factors
            if link.second.name == kernel.name:
                inputs = factors.repeat_interleave(link.repeat)
        return outputs, inputs


def _absorb(sim: QuantSim, link: Link) -> tuple[int, str]:
    """Changes `sim`: moves what always passes the activation into the next bias; (channels, why not where not)."""
    activations = [layer for layer in link.between if layer.kind in ("relu", "leaky_relu", "prelu", "clip", "relu6")]
    if not activations:
        return 0, ""
    upstream = link.between[: link.between.index(activations[0])]
    known = [sim.graph.folded[layer.name] for layer in upstream if layer.name in sim.graph.folded]
    if not known:
        return 0, "biases were not absorbed where no BatchNorm was folded: the spread of the values is not known."
    constant = (known[-1].mean - 3 * known[-1].deviation).clamp_min(0)
    if not bool(constant.any()):
        return 0, ""
    pads = [layer for layer in link.between if layer.kind == "zero_pad" or _averages_padding(layer)]
    if pads or link.second.pads_with_zeros:
        return 0, "biases were not absorbed where zeros are padded: at the border the constant would be missing."
    if not link.second.can_take_bias:
        return 0, ""
    link.first.shift_bias(-constant)
    link.second.shift_bias(link.second.response(constant.repeat_interleave(link.repeat)))
    for layer in upstream:
        if (norm := sim.graph.folded.get(layer.name)) is not None:
            sim.graph.folded[layer.name] = replace(norm, mean=norm.mean - constant)
    return int((constant > 0).sum()), ""


def _averages_padding(layer: Layer) -> bool:
    """Whether an average pool pads, with zeros that it may count."""
    if layer.kind != "avg_pool" or "adaptive" in layer.title.lower():
        return False
    given = layer.args[3] if len(layer.args) > 3 else 0
    padding = layer.module.padding if layer.module is not None else given
    return bool(max(padding) if isinstance(padding, (list, tuple)) else padding)


def _row(link: Link, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], factors: Tensor) -> dict[str, Any]:
    return {
        "layer": link.first.name,
        "with": link.second.name,
        "through": ", ".join(layer.kind for layer in link.between if layer.kind != "identity"),
        "outputs_before": _spread(before[0]),
        "outputs_after": _spread(after[0]),
        "inputs_before": _spread(before[1]),
        "inputs_after": _spread(after[1]),
        "largest_factor": float(torch.maximum(factors, 1 / factors).max()),
    }


def _spread(ranges: Tensor) -> float:
    """The largest range of a channel over the smallest that is not zero."""
    live = ranges[ranges > 0]
    return float(live.max() / live.min()) if live.numel() else 1.0


def _kept_apart(reasons: dict[str, str]) -> str:
    told = _first([f"{name}: {reason}" for name, reason in reasons.items()], "; ")
    return f"not equalized with what follows: {told}."


def _first(parts: list[str], separator: str) -> str:
    """The first parts as a list, and how many more there are."""
    rest = [f"and {len(parts) - 8} more"] if len(parts) > 8 else []
    return separator.join([*parts[:8], *rest])
