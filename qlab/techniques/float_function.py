"""What a technique did to the float function: the model's float result before and after, on one batch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.sim import QuantSim
from qlab.sim.batches import Batches


@dataclass(frozen=True)
class FloatChange:
    """How far the float result moved: the largest absolute difference, and |after - before| / |before| in norm."""

    largest: float
    relative: float

    def __str__(self) -> str:
        return f"{self.relative:.1e} relative, at most {self.largest:.1e}"


class FloatFunction:
    """Remembers the float model's result on the first of `batches`, in eval mode, to compare with later."""

    def __init__(self, sim: QuantSim, batches: Batches) -> None:
        self._sim = sim
        self._batch = next(iter(batches), None)
        self._before = self._result()

    def change(self) -> FloatChange | None:
        """How far the result is now from the one remembered; None where there was no batch."""
        if self._before is None:
            return None
        largest = signal = noise = 0.0
        for before, after in zip(self._before, self._result() or [], strict=True):
            difference = after - before
            largest = max(largest, float(difference.abs().max()) if difference.numel() else 0.0)
            signal, noise = signal + float(before.square().sum()), noise + float(difference.square().sum())
        return FloatChange(largest, (noise / signal) ** 0.5 if signal else float(noise > 0))

    def _result(self) -> list[Tensor] | None:
        if self._batch is None:
            return None
        with self._sim.evaluating():
            leaves = pytree.tree_leaves(self._sim.float_output(self._batch))
        return [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and torch.is_floating_point(leaf)]


def described(change: FloatChange | None, values: dict[str, Any]) -> str:
    """The change as the end of a sentence, its numbers added to `values`; '' where it was not measured."""
    if change is None:
        return ""
    values.update(float_change=change.largest, float_change_relative=change.relative)
    return f"; the float result moved by {change}"
