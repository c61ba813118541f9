"""BatchNorm re-estimation: running statistics of the quantized network instead of those that training left behind."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.errors import InputError
from qlab.graph import Layer
from qlab.graph.batch_norm import BatchNorm
from qlab.progress import Progress
from qlab.settings import setting
from qlab.sim import QuantSim
from qlab.sim.batches import Batches
from qlab.sim.evaluate import evaluation_of
from qlab.sim.placement import Role
from qlab.sim.streaming import simulate
from qlab.techniques.batch_norm_folding import BatchNormFolding
from qlab.techniques.technique import Report, Technique

_NEGLIGIBLE = 0.01  # a mean that moved by a hundredth of a deviation, a deviation that changed by a hundredth
_RANGES = (
    "activation ranges stay as they are, as they should after QAT; ranges that were only calibrated belong to the old "
    "statistics: run sim.calibrate(batches)."
)


@dataclass(frozen=True)
class BatchNormReestimation(Technique):
    """Measures the mean and variance of every BatchNorm anew, with all quantizers at work.

    Each batch is normalised by its own statistics, as in training; the batches' means and (unbiased) variances are
    averaged and become the running statistics. At 4 bits weights flip between grid points until the end of training,
    so that the running averages fit none of the networks they were taken from. With a score the new statistics are kept
    only if the score is not lower.

    When: after QAT, before folding. `fold` folds afterwards and keeps every weight's integers: gamma / sigma goes into
    the scale, one a channel. Cost: one quantized pass over the batches, two more for the score.

    Source: Sun et al. 2019; Peters et al.
    """

    batches: int = setting(100, "batches to measure at most", minimum=1)
    fold: bool = setting(False, "fold each BatchNorm into its layer afterwards, keeping the weight's integers")

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: writes running statistics; folds when asked."""
        norms = {
            layer.index: norm
            for layer in sim.graph
            if (norm := BatchNorm.of(layer)) is not None and norm.has_statistics
        }
        if not norms:
            return Report("BatchNormReestimation", "the model has no BatchNorm with running statistics: nothing to do")
        assert batches is not None
        evaluation = None if score is None else evaluation_of(score)
        before = None if evaluation is None else sim.evaluate(evaluation)
        measured, count = self._measure(sim, norms, batches, progress)
        old = {index: _statistics(norm) for index, norm in norms.items()}
        _write(norms, measured)
        rows = [_row(norm, *old[index]) for index, norm in norms.items()]
        values: dict[str, Any] = {"norms": len(norms), "batches": count}
        summary, reverted = _by_size(rows, count), False
        if evaluation is not None and before is not None:
            after = sim.evaluate(evaluation)
            values |= {"before": before, "after": after}
            summary = f"{evaluation.name} {before} before, {after} after {count} batches"
            if after <= before:
                summary += ": nothing to gain"
            if reverted := after < before:
                _write(norms, old)
                summary += ", the old statistics are back"
        notes = [] if reverted or _ranges_are_trained(sim) else [_RANGES]
        if self.fold:
            report = BatchNormFolding(keep_integers=True).run(sim, None, None, progress)
            notes += [f"then {report.summary}.", *report.notes]
            notes += [f"{row['layer']} was not folded: {row['reason']}." for row in report.rows if not row["into"]]
        return Report("BatchNormReestimation", summary, tuple(rows), tuple(notes), values)

    @torch.no_grad()
    def _measure(
        self, sim: QuantSim, norms: dict[int, BatchNorm], batches: Batches, progress: Progress
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], int]:
        """(mean, variance) of each norm's input in the sim, averaged over batches, and how many there were."""
        sums: dict[int, tuple[Tensor, Tensor]] = {}

        def call(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            norm = norms.get(layer.index)
            if norm is None:
                return simulate(sim, layer, args, kwargs)
            x = args[0]
            if x.numel() == x.shape[1]:
                raise InputError(
                    f"{layer.name!r} sees one value a channel in a batch, which has no variance. Give larger batches."
                )
            variance, mean = torch.var_mean(x.double().movedim(1, 0).flatten(1), dim=1, correction=1)
            total = sums.get(layer.index)
            sums[layer.index] = (mean, variance) if total is None else (total[0] + mean, total[1] + variance)
            value = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.epsilon)
            placed = sim.placed[layer.name]
            rounds = placed.role is Role.QUANTIZED and placed.output is not None and placed.output.encoding is not None
            return placed.output(value) if rounds else value  # type: ignore[misc]

        count = 0
        with sim.evaluating():
            for batch in itertools.islice(batches, self.batches):
                progress.step(count, min(len(batches) or self.batches, self.batches), f"batch {count}")
                sim.graph.run(sim.inputs(batch), call)
                count += 1
        if not count:
            raise InputError("BatchNormReestimation needs at least one batch; the iterable was empty.")
        return {index: (mean / count, variance / count) for index, (mean, variance) in sums.items()}, count


def _ranges_are_trained(sim: QuantSim) -> bool:
    """Whether every activation range is frozen or in training, or there is none yet."""
    found = [q for entry in sim.placed.values() if (q := entry.output) is not None and q.spec.known_range is None]
    return all(q.frozen or q.learned is not None or q.encoding is None for q in found)


def _statistics(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """A copy of (running mean, running variance)."""
    assert norm.running_mean is not None
    assert norm.running_variance is not None
    return norm.running_mean.clone(), norm.running_variance.clone()


@torch.no_grad()
def _write(norms: dict[int, BatchNorm], statistics: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Changes the model: running statistics become `statistics`; a norm called twice takes the mean of its calls."""
    by_buffer: dict[int, list[int]] = {}
    for index, norm in norms.items():
        by_buffer.setdefault(id(norm.running_mean), []).append(index)
    for indices in by_buffer.values():
        norm = norms[indices[0]]
        for position, buffer in enumerate((norm.running_mean, norm.running_variance)):
            assert buffer is not None
            buffer.copy_(torch.stack([statistics[index][position] for index in indices]).mean(0))


def _row(norm: BatchNorm, mean: Tensor, variance: Tensor) -> dict[str, Any]:
    """How far the statistics are now from `mean` and `variance`, in deviations and as a factor of the deviation."""
    sigma = (variance.double() + norm.epsilon).sqrt()
    return {
        "layer": norm.layer.name,
        "mean_moved": float(((norm.mean - mean) / sigma).abs().max()),
        "deviation_factor": float((norm.sigma / sigma).log().abs().max().exp()),
    }


def _by_size(rows: list[dict[str, Any]], count: int) -> str:
    """What the statistics' own movement says where there is no score."""
    mean = max(row["mean_moved"] for row in rows)
    factor = max(row["deviation_factor"] for row in rows)
    told = f"over {count} batches means moved by up to {mean:.2g} deviations, deviations by up to {factor - 1:.1%}"
    return told + (": nothing to gain" if mean < _NEGLIGIBLE and factor - 1 < _NEGLIGIBLE else "")
