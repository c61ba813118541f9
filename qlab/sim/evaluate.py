"""Scores of a model: what is measured, on which batches, and how sure the number is.

An `Evaluation` turns a model's outputs into a `Measurement`, a number that knows its standard error. Agreement and SQNR
compare with the float model as it was when the evaluation first saw the sim, so a technique that changes weights is
measured against the original.
"""

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


class Accuracy(Evaluation):
    """The share of samples whose largest logit is at the label.

    labelled: batches of (x, y), or dicts with 'labels'. Logits [N, C] with labels [N], [N, T, C] with [N, T], or
    [N, C, H, W] with [N, H, W]; labels below 0 are ignored.
    """

    name = "accuracy"

    def __init__(self, labelled: Any) -> None:
        self.batches = Batches(labelled)

    def of_outputs(self, sim: "QuantSim", outputs: Iterable[Any]) -> Measurement:
        """The accuracy of `outputs`."""
        assert self.batches is not None
        correct = total = 0
        for batch, output in zip(self.batches, outputs, strict=True):
            labels = labels_of(sim.graph, batch)
            predicted = predictions(output, labels)
            counted = labels.to(predicted.device) >= 0
            correct += int(((predicted == labels.to(predicted.device)) & counted).sum())
            total += int(counted.sum())
        return _share(correct, total)


class Agreement(Evaluation):
    """The share of predictions (largest logit) that are those of the float model; needs no labels."""

    name = "agreement"

    def __init__(self, batches: Any) -> None:
        self.batches = Batches(batches)
        self._reference = _Reference(self.batches)

    def prepare(self, sim: "QuantSim") -> None:
        """Computes the float model's results once."""
        self._reference.of(sim)

    def of_outputs(self, sim: "QuantSim", outputs: Iterable[Any]) -> Measurement:
        """The agreement of `outputs` with the float model's."""
        same = total = 0
        for wanted, output in zip(self._reference.of(sim), outputs, strict=True):
            a, b = predictions(wanted), predictions(output)
            same, total = same + int((a == b).sum()), total + a.numel()
        return _share(same, total)


class SQNR(Evaluation):
    """Signal to quantization noise of the output in dB: 10 log10(E[y^2] / E[(y - y_float)^2]); needs no labels.

    The standard error is a jackknife over batches. Without any difference the SQNR is infinite.
    """

    name = "SQNR"

    def __init__(self, batches: Any) -> None:
        self.batches = Batches(batches)
        self._reference = _Reference(self.batches)

    def prepare(self, sim: "QuantSim") -> None:
        """Computes the float model's results once."""
        self._reference.of(sim)

    def of_outputs(self, sim: "QuantSim", outputs: Iterable[Any]) -> Measurement:
        """The SQNR of `outputs` against the float model's."""
        signal, noise, samples = [], [], 0
        for wanted, output in zip(self._reference.of(sim), outputs, strict=True):
            pairs = list(zip(float_tensors(wanted), float_tensors(output), strict=True))
            signal.append(sum(float(w.double().square().sum()) for w, _ in pairs))
            noise.append(sum(float((w.double() - o.double()).square().sum()) for w, o in pairs))
            samples += len(pairs[0][0]) if pairs and pairs[0][0].dim() else 1
        total_signal, total_noise = sum(signal), sum(noise)
        value = _decibel(total_signal, total_noise)
        error = None
        if len(signal) > 1 and math.isfinite(value):
            left = [_decibel(total_signal - s, total_noise - n) for s, n in zip(signal, noise, strict=True)]
            mean = sum(left) / len(left)
            error = math.sqrt((len(left) - 1) / len(left) * sum((v - mean) ** 2 for v in left))
        return Measurement(value, error, "dB", samples)


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
    training = sim.training
    sim.eval()
    try:
        evaluation.prepare(sim)
        if quantized:
            return evaluation.of_model(sim)
        with sim.quantization_off():
            return evaluation.of_model(sim)
    finally:
        sim.train(training)


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

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._outputs: dict[str, list[Any]] = {}

    def of(self, sim: "QuantSim") -> list[Any]:
        if sim.origin not in self._outputs:
            self._outputs = {sim.origin: [sim.float_output(batch) for batch in self._batches]}
        return self._outputs[sim.origin]


def _share(part: int, total: int) -> Measurement:
    if not total:
        raise InputError("there is nothing to score: the batches hold no sample.")
    share = part / total
    return Measurement(share, math.sqrt(share * (1 - share) / total), "share", total)


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
