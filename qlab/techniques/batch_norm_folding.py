"""BatchNorm folding: an inference-time BatchNorm is a factor and a shift a channel, which the layer beside it can take.

Targets compute convolution and BatchNorm as one, so weights must be quantized as they are after folding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qlab.graph import FoldedNorm, Layer, LayerGraph
from qlab.graph.batch_norm import BatchNorm
from qlab.graph.kernel import Kernel, kernel_of
from qlab.graph.patterns import Path, Uses, follow
from qlab.progress import Progress
from qlab.settings import setting
from qlab.sim import QuantSim
from qlab.sim.batches import Batches
from qlab.techniques.float_function import FloatFunction, described
from qlab.techniques.stale_ranges import hand_over_ranges, renew_ranges
from qlab.techniques.technique import Report, Technique
from qlab.techniques.weight_grid import scale_weight


@dataclass(frozen=True)
class BatchNormFolding(Technique):
    """Folds every BatchNorm into the convolution, transposed convolution or linear layer beside it.

    Into the layer before: W <- W * gamma / sigma on output channels, b <- beta + (b - mu) * gamma / sigma, with
    sigma = sqrt(var + eps). Where none stands before, into the layer after it, on input channels; that is exact only
    without zero padding, or where no channel is shifted, and is done only then. What is not folded is listed with the
    reason. Cost: milliseconds; no data (with batches the report says how far the float result moved).

    When: first of all techniques, as the target folds anyway; after QAT, following BatchNormReestimation. Learned
    roundings and frozen per-channel encodings go along. With keep_integers every weight keeps its integers and gamma /
    sigma goes into its scale, which becomes one a channel.

    Source: Jacob et al. 2018, arXiv:1712.05877.
    """

    needs_data: ClassVar[bool] = False

    keep_integers: bool = setting(
        False, "keep each weight's integers and put the factor into its scale, one a channel; after QAT"
    )

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: folds what can be folded."""
        norms = [norm for layer in sim.graph if (norm := BatchNorm.of(layer)) is not None]
        if not norms:
            return Report("BatchNormFolding", "the model has no BatchNorm: nothing to fold")
        function = FloatFunction(sim, batches) if batches is not None else None
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        stale: list[Layer] = []
        for done, norm in enumerate(norms):
            progress.step(done, len(norms), norm.layer.name)
            rows.append(self._fold(sim, norm, notes, stale))
        sim.changed()
        notes += [note] if (note := renew_ranges(sim, stale, batches, progress)) else []
        folded = sum(bool(row["into"]) for row in rows)
        values: dict[str, Any] = {"folded": folded, "left": len(rows) - folded}
        change = described(function.change(), values) if function is not None else ""
        summary = f"folded {folded} of {len(norms)} BatchNorms{change}"
        return Report("BatchNormFolding", summary, tuple(rows), tuple(notes), values)

    def _fold(self, sim: QuantSim, norm: BatchNorm, notes: list[str], stale: list[Layer]) -> dict[str, Any]:
        """Changes `sim`: folds one norm, backward or forward; the row for the report.

        Adds to `notes` what must be told and to `stale` the layers whose ranges nothing is known of.
        """
        name = norm.layer.name
        row = {"layer": name, "into": "", "direction": "", "grid": "", "factors": "", "reason": ""}
        if reason := _obstacle(sim.graph, norm):
            return row | {"reason": reason}
        sizes = norm.factor.abs()
        row["factors"] = f"{float(sizes.min()):.2g} to {float(sizes.max()):.2g}"
        uses = Uses(sim.graph)
        before = _before(uses, norm)
        if not isinstance(before, str):
            kernel, passed = before
            bias = kernel.bias
            old = torch.zeros_like(norm.shift) if bias is None else bias.detach().double()
            kernel.shift_bias(old * (norm.factor - 1) + norm.shift)
            rescaled = scale_weight(sim, kernel, outputs=norm.factor, keep_integers=self.keep_integers)
            changed, values_of, direction = [kernel.layer, *passed], norm.layer, "backward"
            known = FoldedNorm(norm.beta, norm.gamma.abs())
        else:
            after = _after(uses, norm)
            if isinstance(after, str):
                return row | {"reason": f"{before}; {after}"}
            kernel, repeat = after.second, after.repeat
            kernel.shift_bias(kernel.response(norm.shift.repeat_interleave(repeat)))
            factor = norm.factor.repeat_interleave(repeat)
            rescaled = scale_weight(sim, kernel, inputs=factor, keep_integers=self.keep_integers)
            changed, values_of, direction = [norm.layer, *after.between], norm.layer.args[0], "forward"
            known = FoldedNorm(norm.mean, norm.sigma)
        unknown, thawed = hand_over_ranges(sim, values_of, changed)
        stale += unknown
        notes += [note for note in (rescaled.note, thawed) if note]
        sim.graph.replace_module(name, "identity")
        for layer in (norm.layer, *changed):
            if layer is norm.layer or layer.name in sim.graph.folded:
                sim.graph.folded[layer.name] = known
        return row | {"into": kernel.name, "direction": direction, "grid": rescaled.grid}


def _obstacle(graph: LayerGraph, norm: BatchNorm) -> str:
    """Why the norm is no constant factor and shift of its own; '' where it is."""
    if not norm.has_statistics:
        return "it keeps no running statistics and normalises by the batch"
    module = norm.layer.module
    if module is not None and module.training:
        return "it is in training mode and normalises by the batch: run sim.eval() first"
    if module is not None and (calls := sum(layer.module is module for layer in graph)) > 1:
        return f"it is called {calls} times"
    return ""


def _before(uses: Uses, norm: BatchNorm) -> tuple[Kernel, list[Layer]] | str:
    """The kernel that alone feeds the norm and the identities between; or why there is none that could take it."""
    source = norm.layer.args[0]
    passed: list[Layer] = []
    while True:
        if isinstance(reason := uses.only_user(source), str):
            return reason
        if source.kind != "identity":
            break
        passed.append(source)
        source = source.args[0]
    kernel = kernel_of(source)
    if kernel is None:
        return f"{source.name!r} ({source.title}) stands before it"
    if reason := uses.sharing(kernel):
        return reason
    if kernel.channel_axis != 1:
        return f"{kernel.name!r} has its channels on another axis"
    return (kernel, passed) if kernel.can_take_bias else f"{kernel.name!r} is a function without a bias"


def _after(uses: Uses, norm: BatchNorm) -> Path | str:
    """The path to the kernel that alone takes the norm's channels; or why none can take it exactly."""
    path = follow(uses, norm.layer, axis=1)
    if isinstance(path, str):
        return path
    for layer in path.between:
        if layer.kind not in ("identity", "reshape", "transpose"):
            return f"{layer.name!r} ({layer.title}) follows"
    if not path.second.can_take_bias:
        return f"{path.second.name!r} is a function without a bias"
    if path.second.pads_with_zeros and bool((norm.shift != 0).any()):
        return f"{path.second.name!r} pads with zeros, which the shift would miss"
    return path
