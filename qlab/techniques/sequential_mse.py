"""SequentialMSE: the weight range with which each layer's output comes out best, layer after layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlab.progress import Progress
from qlab.quantization.rounding import RoundingProblem
from qlab.settings import setting
from qlab.sim import Batches, QuantSim
from qlab.techniques.layer_rounding import Plan, globs, round_layers
from qlab.techniques.rounding_task import RoundingTask
from qlab.techniques.technique import Report, Technique


@dataclass(frozen=True)
class SequentialMSE(Technique):
    """Narrows each weight's range to the one of `candidates` with the least error of the layer's output.

    Candidate i is (i + 1) / candidates of the present range, rounded to nearest; per channel each output channel takes
    its own best, per tensor the one best for all, per block one factor a channel. Every layer is given its inputs in
    the sim as changed so far and its outputs in the float model. Chosen encodings are frozen: calibration leaves them,
    and AdaRound or GPTQ afterwards round on them. Encodings frozen before stay.

    When: at 4 bits and below, where AdaRound is not wanted. Cost: one pass over the data in each model, and for each
    layer `candidates` products M K^2.

    Source: AIMET's sequential MSE.
    """

    candidates: int = setting(20, "ranges to try for each grid", minimum=1, maximum=1000)
    layers: Any = setting(("*",), "globs of the layers to change")  # noqa: RUF009
    max_rows: int = setting(16384, "rows of inputs to sample for each layer", minimum=16)
    memory: int = setting(2048, "to keep activations in, and again for moments", minimum=1, unit="MiB")
    cache_dir: str | None = setting(None, "a folder of finished layers, from which a rerun goes on")
    seed: int = setting(0, "of the rows drawn", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", globs(self.layers))

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: the encodings of the layers' weights, which are frozen."""
        return round_layers(Plan.of(self), self._choose, sim, batches, progress)

    def _choose(self, task: RoundingTask, report: Callable[[str], None]) -> str:
        """Changes the task's quantizer: its scale."""
        if task.moments is None or task.holds_grid:
            return "frozen: kept" if task.holds_grid else "too large: kept"
        problems = task.problems(1e-4, correct_bias=False)
        factors = tuple((i + 1) / self.candidates for i in reversed(range(self.candidates)))
        weight = task.weight

        def nearest(problem: RoundingProblem, rows: slice) -> Tensor:
            return problem.nearest(weight[:, rows].to(problem.target.dtype))

        task.use_scale(problems.search_scale(nearest, factors=factors))
        task.quantizer.freeze()
        return "range"
