"""A training as values: the steps that a view draws, and how a person steers between epochs."""

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.quantization import Quantizer, QuantSpec, WeightQuantizer
from qlab.settings import SettingError
from qlab.sim import QuantSim

BITS, FROZEN = ("weight.bits", "output.bits"), "frozen"


class DivergedLoss(QlabError, ArithmeticError):
    """The loss became NaN or infinite; the last good state is restored."""


@dataclass(frozen=True)
class TrainingEdit:
    """One change before an epoch (the first is 1): `setting` is 'weight.bits', 'output.bits' or 'frozen'.

    A frozen layer's own parameters, its weight's grid and its output's range stay as they are; value False lets them
    train again.
    """

    epoch: int
    layer: str
    setting: str
    value: int | bool

    @classmethod
    def of(cls, told: Any) -> "TrainingEdit":
        """An edit told as (epoch, layer, setting, value); raises SettingError where it is none."""
        try:
            edit = told if isinstance(told, cls) else cls(*told)
        except TypeError:
            edit = None
        if edit is None or edit.setting not in (*BITS, FROZEN) or not isinstance(edit.epoch, int) or edit.epoch < 1:
            raise SettingError(
                f"an edit is (epoch, layer, setting, value), its epoch at least 1 and its setting one of "
                f"{[*BITS, FROZEN]}, such as (2, 'fc', 'weight.bits', 8); got {told!r}."
            )
        if edit.setting in BITS:
            QuantSpec(bits=int(edit.value))
        return edit

    def told(self) -> tuple[int, str, str, int | bool]:
        """The edit as plain values."""
        return self.epoch, self.layer, self.setting, self.value

    def quantizer(self, sim: QuantSim) -> Quantizer:
        """The quantizer whose bits change; raises SettingError where the layer has none."""
        part = self.setting.partition(".")[0]
        found = getattr(sim[self.layer], part)
        if found is None:
            raise SettingError(f"{self.layer!r} has no {part} of its own to quantize.")
        return found

    def __str__(self) -> str:
        if self.setting == FROZEN:
            return f"{self.layer}: {'frozen' if self.value else 'trains again'}"
        return f"{self.layer}: {self.setting.replace('.', ' ')} {self.value}"


class TrainingControl:
    """A person's word in a running QAT, from any thread: changes take effect before the next epoch.

    follow: the layer whose range is published, None for none; it may be changed at any time.
    """

    def __init__(self, follow: str | None = None) -> None:
        self.follow = follow
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, str, int | bool]] = []

    def set_bits(self, layer: str, part: str, bits: int) -> None:
        """Give a layer's 'weight' or 'output' other bits; raises SpecError or SettingError for what cannot be."""
        self._add(layer, f"{part}.bits", bits)

    def freeze(self, layer: str, frozen: bool = True) -> None:
        """Let a layer train no further, or (False) again."""
        self._add(layer, FROZEN, frozen)

    def _add(self, layer: str, setting: str, value: int | bool) -> None:
        TrainingEdit.of((1, layer, setting, value))
        with self._lock:
            kept = [told for told in self._waiting if told[:2] != (layer, setting)]
            self._waiting = [*kept, (layer, setting, value)]

    def take(self, epoch: int) -> list[TrainingEdit]:
        """What waits, as edits before `epoch`; nothing waits afterwards."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        return [TrainingEdit(epoch, *told) for told in waiting]

    @property
    def waiting(self) -> list[str]:
        """What will be changed before the next epoch, in words."""
        with self._lock:
            return [str(TrainingEdit(1, *told)) for told in self._waiting]

    def __repr__(self) -> str:
        return f"TrainingControl(follow={self.follow!r}, waiting={self.waiting})"


@dataclass(frozen=True)
class TrainingStep:
    """What a view draws: published after steps (score None) and epochs.

    step: optimizer steps so far, over all epochs. loss: of that batch, or the mean of the epoch. layer, part: what is
    followed; low, high: its range; clipped: the share of its values in that batch that lie beyond the ends of the grid
    by more than half a step, where no gradient passes. control: for a view's fields.
    """

    step: int
    epoch: int
    loss: float
    score: float | None = None
    layer: str | None = None
    part: str = "output"
    low: float = math.nan
    high: float = math.nan
    clipped: float = math.nan
    control: TrainingControl | None = field(default=None, repr=False, compare=False)


class Follower:
    """Looks at the output of a layer while a batch passes, or at its weight where that alone is quantized."""

    def __init__(self, sim: QuantSim, layer: str | None) -> None:
        self.layer = layer if layer in sim.placed else None
        found = None if self.layer is None else sim[self.layer]
        parts = () if found is None else (found.output, found.weight)
        self._quantizer = next((q for q in parts if q is not None and q.enabled), None)
        self.part = "weight" if isinstance(self._quantizer, WeightQuantizer) else "output"
        self._shares: list[float] = []
        self._hook: Any = None

    def __enter__(self) -> "Follower":
        if self._quantizer is not None and self.part == "output":
            # A second argument that is true says that the first stands for its ReLU.
            self._hook = self._quantizer.register_forward_pre_hook(
                lambda _, args: self._look(args[0].relu() if any(args[1:]) else args[0])
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def step(self, step: int, epoch: int, loss: float, control: TrainingControl) -> TrainingStep:
        """The record of a step that passed."""
        quantizer = self._quantizer
        if quantizer is None or quantizer.encoding is None:
            return TrainingStep(step, epoch, loss, control=control)
        if isinstance(quantizer, WeightQuantizer):
            self._look(quantizer.weight)
        low, high = float(quantizer.encoding.minimum.min()), float(quantizer.encoding.maximum.max())
        clipped = sum(self._shares) / len(self._shares) if self._shares else math.nan
        return TrainingStep(step, epoch, loss, None, self.layer, self.part, low, high, clipped, control)

    @torch.no_grad()
    def _look(self, values: Tensor) -> None:
        assert self._quantizer is not None
        encoding = self._quantizer.required_encoding()
        scale, zero_point = encoding.broadcast(values.shape)
        low, high = (encoding.qmin - zero_point - 0.5) * scale, (encoding.qmax - zero_point + 0.5) * scale
        self._shares.append(float(((values < low) | (values > high)).float().mean()))
