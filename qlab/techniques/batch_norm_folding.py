"""BatchNorm folding: an inference-time BatchNorm is a factor and a shift a channel, which the layer beside it can take.

Targets compute convolution and BatchNorm as one, so weights must be quantized as they are after folding.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qlab.graph import FoldedNorm, Layer
from qlab.graph.batch_norm import BatchNorm
from qlab.graph.folding import folding_obstacle, kernel_after, kernel_before
from qlab.graph.patterns import Uses
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
        if reason := folding_obstacle(sim.graph, norm):
            return row | {"reason": reason}
        sizes = norm.factor.abs()
        row["factors"] = f"{float(sizes.min()):.2g} to {float(sizes.max()):.2g}"
        uses = Uses(sim.graph)
        before = kernel_before(uses, norm)
        if not isinstance(before, str):
            kernel, passed = before
            bias = kernel.bias
            old = torch.zeros_like(norm.shift) if bias is None else bias.detach().double()
            kernel.shift_bias(old * (norm.factor - 1) + norm.shift)
            rescaled = scale_weight(sim, kernel, outputs=norm.factor, keep_integers=self.keep_integers)
            changed, values_of, direction = [kernel.layer, *passed], norm.layer, "backward"
            known = FoldedNorm(norm.beta, norm.gamma.abs())
        else:
            after = kernel_after(uses, norm)
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
