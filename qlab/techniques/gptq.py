"""GPTQ: round column after column, letting the rest make up for what each one lost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlab.progress import Progress
from qlab.quantization.rounding import coordinate_descent, factor_metric, nearest_plane
from qlab.settings import setting
from qlab.sim import Batches, QuantSim
from qlab.techniques.layer_rounding import Plan, globs, round_layers
from qlab.techniques.rounding_task import RoundingTask
from qlab.techniques.technique import Report, Technique


@dataclass(frozen=True)
class GPTQ(Technique):
    """Rounds each weight's columns one by one, in decreasing order of their inputs' energy, on the grid as it is.

    What a column lost goes into the target of the columns after it; `sweeps` of coordinate descent then move single
    integers to where the others want them. Inputs are those of the sim as rounded so far and targets those of the float
    model, as in AdaRound, with which it shares its moments; AdaRound also tries out scales and corrects the bias.

    When: as AdaRound, where scale and bias must stay what they are. Cost: one pass over the data in each model, and for
    each layer K^3 + (1 + sweeps) M K^2 for M outputs of K weights.

    Sources: Frantar et al. 2023, arXiv:2210.17323; Behdin et al. 2023, arXiv:2309.01885 (QuantEase).
    """

    sweeps: int = setting(3, "of coordinate descent afterwards", minimum=0, maximum=100)
    layers: Any = setting(("*",), "globs of the layers to round")  # noqa: RUF009
    damping: float = setting(0.01, "how firmly weights stay where the data say little", minimum=1e-6, maximum=1.0)
    max_rows: int = setting(16384, "rows of inputs to sample for each layer", minimum=16)
    memory: int = setting(2048, "to keep activations in, and again for moments", minimum=1, unit="MiB")
    cache_dir: str | None = setting(None, "a folder of finished layers, from which a rerun goes on")
    seed: int = setting(0, "of the rows drawn", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", globs(self.layers))

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: the rounding of the layers' weights."""
        return round_layers(Plan.of(self), self._choose, sim, batches, progress)

    def _data(self, batches: Any) -> Batches | None:
        return None if batches is None else super()._data(batches)

    def _choose(self, task: RoundingTask, report: Callable[[str], None]) -> str:
        """Changes the task's quantizer."""
        if task.moments is None:
            return "too large: to nearest"
        problems = task.problems(self.damping, correct_bias=False)
        factor = factor_metric(problems.metric)
        found = ((rows, coordinate_descent(p, nearest_plane(p, factor), self.sweeps)) for rows, p in problems)
        task.use_levels(found, correct_bias=False)
        return "columns"
