"""Scores of a model: what is measured, on which batches, and how sure the number is.

An `Evaluation` turns a model's outputs into a `Measurement`, a number that knows its standard error. Agreement and SQNR
compare with the float model as it was when the evaluation first saw the sim, so a technique that changes weights is
measured against the original.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.errors import InputError
from qlab.sim.batches import Batches, labels_of

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim


class Measurement(float):
    """A score: a number with its standard error (None where unknown), unit and the samples behind it."""

    standard_error: float | None
    unit: str
    samples: int

    def __new__(
        cls, value: float, standard_error: float | None = None, unit: str = "", samples: int = 0
    ) -> "Measurement":
        self = super().__new__(cls, value)
        self.standard_error, self.unit, self.samples = standard_error, unit, samples
        return self

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval: Wilson's for shares of samples, else two standard errors; None where unknown.

        >>> low, high = Measurement(0.9, 0.03, "share", 100).interval
        >>> round(low, 3), round(high, 3)
        (0.826, 0.945)
        """
        if self.unit == "share" and self.samples:
            n, p, z = self.samples, float(self), 1.96
            centre = (p + z * z / (2 * n)) / (1 + z * z / n)
            half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
            return max(0.0, centre - half), min(1.0, centre + half)
        if self.standard_error is None:
            return None
        return float(self) - 1.96 * self.standard_error, float(self) + 1.96 * self.standard_error

    def __repr__(self) -> str:
        if self.unit == "share":
            bounds = self.interval
            spread = f" (95 %: {bounds[0]:.1%} to {bounds[1]:.1%})" if bounds else ""
            return f"{float(self):.1%}{spread}"
        spread = f" ± {self.standard_error:.2g}" if self.standard_error is not None else ""
        return f"{float(self):.4g}{spread}{' ' + self.unit if self.unit else ''}"

    __str__ = __repr__

    def __reduce__(self) -> Any:
        return Measurement, (float(self), self.standard_error, self.unit, self.samples)


class Evaluation(ABC):
    """A way to score a model. `name` labels it; larger is better.

    batches: what the model is run on, None where the evaluation calls the model itself.
    """

    name: str
    batches: Batches | None = None

    @abstractmethod
    def of_outputs(self, sim: "QuantSim", outputs: Iterable[Any]) -> Measurement:
        """The score of `outputs`, the model's results on each of `batches`."""

    def prepare(self, sim: "QuantSim") -> None:  # noqa: B027  most scores need nothing
        """Gathers what the score needs beside outputs, such as the float model's results."""

    def of_model(self, sim: "QuantSim") -> Measurement:
        """The score of `sim` in its present state, by running it on `batches`."""
        self.prepare(sim)
        assert self.batches is not None
        return self.of_outputs(sim, (sim.output(batch) for batch in self.batches))


class PerSample(Evaluation):
    """An evaluation that depends on its data through sums over samples alone, as a mean or a ratio of means does.

    Each sample adds a row of numbers, `value` makes the score of their sum. So batches can be scored apart, in any
    order and place, and two states of a model compared sample by sample, far more sharply than by their scores.
    """

    batches: Batches

    @abstractmethod
    def tally(self, sim: "QuantSim", number: int, batch: Any, output: Any) -> Tensor:
        """What `output` on `batch`, number `number` of `batches`, adds: float64 [samples, k], on the CPU."""

    @abstractmethod
    def value(self, sums: Tensor) -> Tensor:
        """The score of sums [.., k], as [..]."""

    @abstractmethod
    def of_tallies(self, rows: Tensor) -> Measurement:
        """The score of the rows [samples, k] of all batches, with its standard error."""

    def only(self, sim: "QuantSim", number: int, batch: Any) -> "PerSample":
        """The same evaluation on this one batch, with what it needs for it: small enough to send elsewhere."""
        part = copy.copy(self)
        part.batches = Batches([batch])
        return part

    def of_outputs(self, sim: "QuantSim", outputs: Iterable[Any]) -> Measurement:
        """The score of `outputs`, one for each batch."""
        pairs = enumerate(zip(self.batches, outputs, strict=True))
        rows = [self.tally(sim, number, batch, output) for number, (batch, output) in pairs]
        if not sum(map(len, rows)):
            raise InputError("there is nothing to score: the batches hold no sample.")
        return self.of_tallies(torch.cat(rows))


class _Share(PerSample):
    """A share of predictions: rows of (right, counted)."""

    def value(self, sums: Tensor) -> Tensor:
        """right / counted."""
        return sums[..., 0] / sums[..., 1]

    def of_tallies(self, rows: Tensor) -> Measurement:
        """The share, with its binomial standard error."""
        part, total = map(int, rows.sum(0))
        if not total:
            raise InputError("there is nothing to score: the batches hold no sample.")
        share = part / total
        return Measurement(share, math.sqrt(share * (1 - share) / total), "share", total)


class Accuracy(_Share):
    """The share of samples whose largest logit is at the label.

    labelled: batches of (x, y), or dicts with 'labels'. Logits [N, C] with labels [N], [N, T, C] with [N, T], or
    [N, C, H, W] with [N, H, W]; labels below 0 are ignored.
    """

    name = "accuracy"

    def __init__(self, labelled: Any) -> None:
        self.batches = Batches(labelled)

    def tally(self, sim: "QuantSim", number: int, batch: Any, output: Any) -> Tensor:
        """(right, counted) of each sample."""
        labels = labels_of(sim.graph, batch)
        predicted = predictions(output, labels)
        labels = labels.to(predicted.device)
        return _by_sample((predicted == labels) & (labels >= 0), labels >= 0)


class _Compared(PerSample):
    """An evaluation that compares with the float model's results."""

    def __init__(self, batches: Any) -> None:
        self.batches = Batches(batches)
        self._reference = _Reference(self.batches)

    def prepare(self, sim: "QuantSim") -> None:
        """Computes the float model's results once."""
        self._reference.of(sim)

    def only(self, sim: "QuantSim", number: int, batch: Any) -> "PerSample":
        """As PerSample.only, with the float model's result on that batch."""
        part = super().only(sim, number, batch)
        assert isinstance(part, _Compared)
        part._reference = _Reference(part.batches, {sim.origin: [self._reference.of(sim)[number]]})
        return part


class Agreement(_Compared, _Share):
    """The share of predictions (largest logit) that are those of the float model; needs no labels."""

    name = "agreement"

    def tally(self, sim: "QuantSim", number: int, batch: Any, output: Any) -> Tensor:
        """(equal, counted) of each sample."""
        equal = predictions(self._reference.of(sim)[number]) == predictions(output)
        return _by_sample(equal, torch.ones_like(equal))


class SQNR(_Compared):
    """Signal to quantization noise of the output in dB: 10 log10(E[y^2] / E[(y - y_float)^2]); needs no labels.

    The standard error is a jackknife over samples. Without any difference the SQNR is infinite.
    """

    name = "SQNR"

    def tally(self, sim: "QuantSim", number: int, batch: Any, output: Any) -> Tensor:
        """(signal, noise) of each sample; one row where the results have no common first axis."""
        wanted = float_tensors(self._reference.of(sim)[number])
        pairs = [(w.double(), w.double() - o.double()) for w, o in zip(wanted, float_tensors(output), strict=True)]
        sizes = {w.shape[0] if w.dim() else 0 for w, _ in pairs}
        samples = sizes.pop() if len(sizes) == 1 else 0
        shape = (samples, -1) if samples else (1, -1)
        signal, noise = (sum(part.square().reshape(shape).sum(1) for part in side) for side in zip(*pairs, strict=True))
        return torch.stack([signal, noise], 1).cpu()

    def value(self, sums: Tensor) -> Tensor:
        """The ratio in dB, infinite where there is no noise."""
        signal, noise = sums[..., 0], sums[..., 1]
        return torch.where(noise == 0, math.inf, 10 * torch.log10(signal / noise))

    def of_tallies(self, rows: Tensor) -> Measurement:
        """The SQNR, with its standard error."""
        total = rows.sum(0)
        value, error = float(self.value(total)), None
        if len(rows) > 1 and math.isfinite(value):
            left = self.value(total - rows)
            error = math.sqrt((len(rows) - 1) / len(rows) * float((left - left.mean()).square().sum()))
        return Measurement(value, error, "dB", len(rows))


class Score(Evaluation):
    """Any function of a model that returns a number; larger is better."""

    def __init__(self, function: Callable[[nn.Module], Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or getattr(function, "__name__", "score").strip("<>")

    def of_outputs(self, sim: "QuantSim", outputs: Iterable[Any]) -> Measurement:
        """Not offered: the function calls the model itself."""
        raise NotImplementedError(f"{self.name} scores a model, not outputs.")

    def of_model(self, sim: "QuantSim") -> Measurement:
        """The function's value for `sim`, without gradient."""
        with torch.no_grad():
            value = self.function(sim)
        return value if isinstance(value, Measurement) else Measurement(float(value))


def evaluation_of(score: "Evaluation | Callable[[nn.Module], Any]") -> Evaluation:
    """`score` as an Evaluation; a plain function becomes a Score."""
    if isinstance(score, Evaluation):
        return score
    if callable(score):
        return Score(score)
    raise InputError(f"score must be an Evaluation or a function of a model; got {type(score).__name__}.")


def evaluate(sim: "QuantSim", score: "Evaluation | Callable[[nn.Module], Any]", quantized: bool) -> Measurement:
    """The score of `sim`, in eval mode, quantized or not."""
    evaluation = evaluation_of(score)
    with sim.evaluating():
        evaluation.prepare(sim)
        if quantized:
            return evaluation.of_model(sim)
        with sim.quantization_off():
            return evaluation.of_model(sim)


def float_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's result, in order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]


def predictions(output: Any, labels: Tensor | None = None) -> Tensor:
    """The index of the largest logit: classes on axis 1 of images [N, C, H, W], else on the last axis."""
    tensors = [t for t in float_tensors(output) if t.dim()]
    if not tensors:
        raise InputError("the model returns no float tensor to take a prediction from.")
    logits = tensors[0]
    spatial = logits.dim() > 2 and (logits.shape[2:] == labels.shape[1:] if labels is not None else logits.dim() >= 4)
    return logits.argmax(1 if spatial else -1)


class _Reference:
    """The float model's results, computed once for each original model."""

    def __init__(self, batches: Batches, outputs: dict[str, list[Any]] | None = None) -> None:
        self._batches = batches
        self._outputs = outputs or {}

    def of(self, sim: "QuantSim") -> list[Any]:
        if sim.origin not in self._outputs:
            self._outputs = {sim.origin: [sim.float_output(batch) for batch in self._batches]}
        return self._outputs[sim.origin]


def _by_sample(part: Tensor, whole: Tensor) -> Tensor:
    """Two boolean tensors [samples, ..] as counts [samples, 2]."""
    samples = part.shape[0] if part.dim() else 1
    return torch.stack([side.reshape(samples, -1).sum(1).double() for side in (part, whole)], 1).cpu()
