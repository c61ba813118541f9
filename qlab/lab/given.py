"""What a lab was given, and the names that it has in the script."""

from collections.abc import Callable
from typing import Any

from qlab.lab.journal import Named
from qlab.sim import Batches, Evaluation, evaluation_of


class Given:
    """Data and score of a lab. known: the names that a script has for them."""

    def __init__(self, batches: Any, score: Evaluation | Callable[[Any], Any] | None) -> None:
        self.batches = Batches(batches)
        self.score = score
        self.evaluation = None if score is None else evaluation_of(score)
        self.known: dict[str, object] = {"batches": self.batches}
        if self.evaluation is not None:
            self.known["score"] = score
            if self.evaluation.batches is not None:
                self.known["score.batches"] = self.evaluation.batches

    def named(self, value: object) -> Named:
        """How a script can call `value`."""
        return Named.find(value, self.known)
