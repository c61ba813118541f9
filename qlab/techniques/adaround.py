"""AdaRound: choose for each weight whether it goes up or down, so that the layer's outputs come out right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.progress import Progress
from qlab.quantization.rounding import (
    MAX_ENUMERATED,
    Factor,
    RoundingProblem,
    SoftRounding,
    coordinate_descent,
    enumerate_roundings,
    factor_metric,
    nearest_plane,
    relax,
)
from qlab.settings import setting
from qlab.sim import Batches, QuantSim
from qlab.techniques.layer_rounding import Plan, globs, round_layers
from qlab.techniques.rounding_task import RoundingTask
from qlab.techniques.soft_training import SAMPLES, train_rounding
from qlab.techniques.technique import Report, Technique

_STEP = 1e7  # what a step of training costs beside its products, in operations: 0.5 ms


@dataclass(frozen=True)
class AdaRound(Technique):
    """Rounds weights up or down so that each layer's output error is least, layer after layer.

    Every layer is given its inputs in the sim as rounded so far and its outputs in the float model, so that it makes up
    for errors before it. method:
      'gram'  minimises the error over all data at once, through second moments: the soft rounding of AdaRound for 1,000
              steps of Adam, and the lattice search below; the better one for each output channel.
      'sgd'   the paper: soft rounding, minibatches of 32, the activation function in the loss, 10,000 steps.
      'auto'  a search on the lattice (nearest plane and coordinate descent; all 512 roundings of a 3x3 depthwise
              kernel), which errs no more than 'sgd' at 10,000 steps in less than a fortieth of its time (three small
              networks, benchmarks/adaround.py); 'sgd' where the search would cost more or not fit in memory.
    Before rounding, the scale is tried out (`search_scale`), and what rounding leaves of the mean error goes into the
    bias (`correct_bias`; it is added while the weight is quantized, the float bias stays).

    The chosen integers freeze the encoding: calibration leaves them alone. When bits, scheme, granularity or rule of a
    layer are changed afterwards, its rounding ends and `apply(sim)` without data finds a new one from the moments that
    stay with the sim. Changed weights end it, too, and need data.

    When: after BatchNorm folding, equalization and calibration; below 8 bits above all. Cost: one pass over the data in
    each model, and for each layer K^3 + 15 M K^2 for M outputs of K weights.

    Source: Nagel et al. 2020, arXiv:2004.10568; see qlab.quantization.rounding for the searches.
    """

    method: str = setting("auto", "how roundings are found", choices=("auto", "gram", "sgd"))
    iterations: int | None = setting(
        None, "steps of sgd (10,000 when not given) or gram (1,000)", minimum=1, maximum=1_000_000
    )
    layers: Any = setting(("*",), "globs of the layers to round")  # noqa: RUF009
    search_scale: bool = setting(True, "try narrower grids for the outputs' sake; frozen grids stay")
    correct_bias: bool = setting(True, "move the mean of the remaining error into the bias")
    damping: float = setting(0.01, "how firmly weights stay where the data say little", minimum=1e-6, maximum=1.0)
    max_rows: int = setting(16384, "rows of inputs to sample for each layer", minimum=16)
    memory: int = setting(2048, "to keep activations in, and again for moments", minimum=1, unit="MiB")
    cache_dir: str | None = setting(None, "a folder of finished layers, from which a rerun goes on")
    seed: int = setting(0, "of the rows and minibatches drawn", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", globs(self.layers))

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: the rounding of the layers' weights, and their scale and bias where asked."""
        if batches is None and self.method == "sgd":
            raise InputError("AdaRound(method='sgd') needs data: give batches to apply, or choose another method.")
        return round_layers(Plan.of(self), self._choose, sim, batches, progress)

    def _data(self, batches: Any) -> Batches | None:
        return None if batches is None else super()._data(batches)

    def _choose(self, task: RoundingTask, report: Callable[[str], None]) -> str:
        """Changes the task's quantizer; returns how."""
        if task.moments is None or (self.method == "auto" and self._is_cheaper_trained(task)):
            if self.search_scale and not task.holds_grid:
                rough = task.rough_problems()
                task.use_scale(rough.search_scale(lambda p, _: p.nearest(), task.quantizer.bits))
            self._train(task, report)
            return "sgd"
        problems = task.problems(self.damping, self.correct_bias)
        factor = factor_metric(problems.metric)
        if self.search_scale and not task.holds_grid:
            task.use_scale(problems.search_scale(lambda p, _: nearest_plane(p, factor), task.quantizer.bits))
        if self.method == "sgd":
            self._train(task, report)
            return "sgd"
        output = sum(float(p.energy().sum()) for _, p in problems) / problems.rows if self.method == "gram" else 0.0
        forms: list[str] = []

        def found() -> Iterator[tuple[slice, Tensor]]:
            for rows, problem in problems:
                form, levels = search(problem, factor)
                if self.method == "gram":
                    soft = SoftRounding(self.iterations or 1000)
                    each = _reporter(report, soft.steps)
                    relaxed = coordinate_descent(problem, relax(problem, soft, each=each, output=output))
                    better = problem.error(relaxed) < problem.error(levels)
                    form, levels = "gram", torch.where(better[..., None], relaxed, levels)
                forms.append(form)
                yield rows, levels

        task.use_levels(found(), self.correct_bias)
        return forms[0]

    def _train(self, task: RoundingTask, report: Callable[[str], None]) -> None:
        """Changes the task's quantizer: the paper's form."""
        steps = self.iterations or 10_000
        levels = train_rounding(task, SoftRounding(steps), self.memory << 19, self.seed, _reporter(report, steps))
        task.use_levels(levels, self.correct_bias)

    def _is_cheaper_trained(self, task: RoundingTask) -> bool:
        """Whether minibatches cost less than the search: one output of very many inputs, say."""
        if task.stop is None:
            return False
        groups, outputs, inputs = task.weight.shape
        x, _ = next(task.stop.inputs(task.form.operand))
        rows = SAMPLES * task.form.positions(x) / max(len(x), 1)
        trained = (self.iterations or 10_000) * (6.0 * groups * outputs * inputs * rows + _STEP)
        return groups * inputs**2 * (inputs + 15.0 * outputs) > trained


def search(problem: RoundingProblem, factor: Factor, sweeps: int = 3) -> tuple[str, Tensor]:
    """(form, levels): every rounding tried where there are few, else the nearest plane; then coordinate descent."""
    if problem.target.shape[2] <= MAX_ENUMERATED:
        form, levels = "enumeration", enumerate_roundings(problem)
    else:
        form, levels = "search", nearest_plane(problem, factor)
    return form, coordinate_descent(problem, levels, sweeps)


def _reporter(report: Callable[[str], None], steps: int) -> Callable[[int], None]:
    """Reports every hundredth step, so that the work can be cancelled in between."""
    return lambda step: None if step % 100 else report(f"step {step} of {steps}")
