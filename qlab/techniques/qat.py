"""Quantization-aware training: the weights learn to live with the grid.

The loss is computed through the simulation, gradients pass the rounding straight through. The state with the best
score is kept. Sources: Jacob et al. 2018, arXiv:1712.05877 (training through the simulation); Esser et al. 2020,
arXiv:1902.08153 and Jain et al. 2020, arXiv:1903.08066 (learning ranges).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from qlab.errors import InputError
from qlab.progress import Progress
from qlab.settings import setting
from qlab.sim import QuantSim
from qlab.sim.batches import Batches, labels_of
from qlab.techniques.qat_run import QATRun
from qlab.techniques.technique import Report, Technique
from qlab.techniques.training_control import TrainingEdit


@dataclass(frozen=True)
class QAT(Technique):
    """Fine-tunes weights (and ranges) with quantization in the loop.

    What: a few epochs of Adam through the simulation, learning rate annealed by a cosine. When: after the techniques
    without training, when the score is still short and a training set is at hand; at 4 bits it gains most. Cost: 1.1 to
    1.8 times that of float training. `apply(sim, labelled)` takes batches of (x, y); without labels only
    `distill` can train. The sim stays in float where a quantizer is off. `loss` may be any function of (result,
    labels). A layer can be frozen or given other bits between epochs: by `edits`, such as (2, "fc", "weight.bits", 8)
    before the second epoch or (3, "stem.conv", "frozen", True); by a person through a `qlab.TrainingControl` while it
    runs; or by `between_epochs(sim, epoch)`, called before each epoch, the first being 0. After a change of bits the
    best epoch is chosen among those that follow.
    """

    needs_labels: ClassVar[bool] = True

    mode: str = setting("range_learning", "what trains beside the weights", choices=("regular", "range_learning"))
    epochs: int = setting(1, "passes over the data", minimum=1, maximum=1000)
    learning_rate: float = setting(1e-3, "of the weights, at the start", minimum=0.0, maximum=1.0)
    range_learning_rate: float = setting(1e-2, "of the ranges, relative to each range's size", minimum=0.0, maximum=1.0)
    loss: Any = setting("cross_entropy", "of (result, labels), or a function in code", hidden=True)  # noqa: RUF009
    distill: bool = setting(True, "also learn the float model's own outputs, weighted equally")
    batch_norm: str = setting("frozen", "statistics of BatchNorm while training", choices=("frozen", "moving"))
    lsq: bool = setting(False, "scale the gradients of ranges as LSQ does")
    on_cancel: str = setting(
        "restore", "when cancelled: the sim as it was, or the best epoch", choices=("restore", "best")
    )
    checkpoint_dir: str | None = setting(None, "a folder for a checkpoint per epoch, from which a rerun resumes")
    seed: int = setting(0, "of the order of batches and of dropout", minimum=0)
    follow: str | None = setting(None, "layer whose range is published while training", hidden=True)
    edits: Any = setting((), "(epoch, layer, setting, value): changes before an epoch", hidden=True)  # noqa: RUF009
    stop_after: int | None = setting(None, "end after this epoch of the schedule", minimum=1, hidden=True)
    between_epochs: Any = setting(None, "called as between_epochs(sim, epoch)", hidden=True)  # noqa: RUF009
    control: Any = setting(None, "a TrainingControl, to steer while it runs", hidden=True)  # noqa: RUF009

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "edits", tuple(TrainingEdit.of(edit).told() for edit in self.edits))

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`; see `apply`."""
        assert batches is not None
        data = list(batches)
        if not data:
            raise InputError("QAT needs at least one batch; the iterable was empty.")
        if not self.distill or self.loss != "cross_entropy":
            labels_of(sim.graph, data[0])
        return QATRun(self, sim, data, score, progress).train()
