"""One training run of QAT: its optimizer, what changes between epochs, its best state."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlab.errors import Cancelled, InputError
from qlab.progress import Progress, publish
from qlab.quantization import WeightQuantizer
from qlab.sim import QuantSim, Snapshot
from qlab.sim.batches import labels_of
from qlab.sim.evaluate import evaluation_of, float_tensors
from qlab.sim.training import collapsed_ranges
from qlab.techniques.qat_checkpoint import Checkpoint
from qlab.techniques.technique import Report
from qlab.techniques.training_control import (
    FROZEN,
    DivergedLoss,
    Follower,
    TrainingControl,
    TrainingEdit,
    TrainingStep,
)

if TYPE_CHECKING:
    from qlab.techniques.qat import QAT

_TOLD_EVERY = 5  # steps


class QATRun:
    """One training run: its optimizer, its best state, its checkpoints."""

    def __init__(self, settings: "QAT", sim: QuantSim, data: list[Any], score: Any, progress: Progress) -> None:
        self.settings, self.sim, self.data, self.progress = settings, sim, data, progress
        self.evaluation = evaluation_of(score) if score is not None else None
        self.teacher = _teacher(sim) if settings.distill else None
        self.has_labels = _has_labels(sim, data[0])
        self.notes = sim.qat(settings.mode, settings.lsq)
        weights = [p for p in sim.model.parameters() if p.requires_grad]
        ranges = list(sim.range_parameters())
        groups: list[dict[str, Any]] = [{"params": weights, "lr": settings.learning_rate}]
        # Adam's steps have the size of its rate whatever the gradient: a range needs one that fits its own size.
        groups += [{"params": [p], "lr": settings.range_learning_rate * _size(p)} for p in ranges]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.rates = [group["lr"] for group in groups]
        self.control: TrainingControl = settings.control or TrainingControl(settings.follow)
        self.edits: list[TrainingEdit] = []  # those done, in order
        self._held: dict[int, tuple[nn.Parameter, bool]] = {}  # of frozen layers, whether they trained before
        self.steps = 0
        self.epochs: list[dict[str, Any]] = []
        self.before = {id(q): q.weight.detach().clone() for q in _weight_quantizers(sim)}
        self._is_cancelled = False
        self.best = self._measure()
        self.start = self.best
        self._keep(0)

    def train(self) -> Report:
        settings, sim = self.settings, self.sim
        try:
            self._train()
        except Cancelled:
            if settings.on_cancel == "restore" or not self.epochs:
                raise
            self._is_cancelled = True
            self.notes.append(f"cancelled in epoch {len(self.epochs) + 1}; the best epoch so far is kept")
        finally:
            for parameter, trained in self._held.values():
                parameter.requires_grad_(trained)
        self.best_state.restore()
        collapsed = collapsed_ranges(sim)
        if collapsed:
            self.notes.append(f"ranges at their bounds: {', '.join(collapsed[:5])}; they were kept valid")
        self.notes += [f"before epoch {edit.epoch}: {edit}" for edit in self.edits]
        self.notes += [f"asked for in the last epoch, too late: {edit}" for edit in self.control.waiting]
        sim.qat(None)
        sim.eval()
        return self._report()

    def _train(self) -> None:
        settings, sim = self.settings, self.sim
        checkpoint = Checkpoint.open(self)
        first = checkpoint.resume(self) if checkpoint else 0
        planned = [TrainingEdit.of(edit) for edit in settings.edits]
        for epoch in range(first, min(settings.epochs, settings.stop_after or settings.epochs)):
            if settings.between_epochs is not None:
                settings.between_epochs(sim, epoch)
            for edit in [e for e in planned if e.epoch == epoch + 1] + self.control.take(epoch + 1):
                self.edit(edit)
            loss = self._epoch(epoch)
            value = self._measure() if self.evaluation is not None else -loss
            self.epochs.append({"epoch": epoch + 1, "loss": loss, self._score_name: float(value)})
            publish(self.progress, TrainingStep(self.steps, epoch, loss, float(value), control=self.control))
            if self.evaluation is None or value >= self.best:
                self.best = value
                self._keep(epoch + 1)
            if checkpoint:
                checkpoint.write(self, epoch + 1)

    def edit(self, edit: TrainingEdit) -> None:
        """Changes the sim between epochs; raises UnknownLayer or SettingError for what it does not have."""
        layer = self.sim[edit.layer]
        if edit.setting == FROZEN:
            module = self.sim.graph[edit.layer].module
            own = [] if module is None else list(module.parameters(recurse=False))
            for quantizer in (layer.weight, layer.output):
                own += [] if quantizer is None else list(quantizer.parameters())
            for parameter in own:
                _, trained = self._held.setdefault(id(parameter), (parameter, parameter.requires_grad))
                parameter.requires_grad_(trained and not edit.value)
        else:
            edit.quantizer(self.sim).bits = int(edit.value)
            self.best = -math.inf  # what was best before had other bits
            self._hold_new_ranges()
        self.edits.append(edit)

    def _hold_new_ranges(self) -> None:
        """Changes the optimizer: a range that became another kind of parameter trains as the rest."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for parameter in self.sim.range_parameters():
            if id(parameter) not in held:
                rate = self.settings.range_learning_rate * _size(parameter)
                self.optimizer.add_param_group({"params": [parameter], "lr": rate})
                self.rates.append(rate)

    def _keep(self, epoch: int) -> None:
        """Remembers the present state as the best one."""
        self.best_state, self.best_epoch = Snapshot(self.sim), epoch
        if self.settings.checkpoint_dir is not None:
            self.best_tensors = {k: v.detach().clone() for k, v in self.sim.state_dict().items()}

    @property
    def _score_name(self) -> str:
        return self.evaluation.name if self.evaluation is not None else "score"

    def _epoch(self, epoch: int) -> float:
        sim, settings = self.sim, self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        total = 0.0
        with torch.random.fork_rng(devices=[]), _training(sim, settings.batch_norm):
            torch.manual_seed(settings.seed * 1_000_003 + epoch)
            for done, index in enumerate(order):
                at = epoch * len(order) + done
                self.progress.step(at, settings.epochs * len(order), f"epoch {epoch + 1} of {settings.epochs}")
                is_told = self.steps % _TOLD_EVERY == 0
                with Follower(sim, self.control.follow if is_told else None) as follower:
                    loss = self._loss(self.data[index])
                value = float(loss.detach())
                if not math.isfinite(value):
                    self._diverged(epoch, done)
                factor = 0.5 * (1 + math.cos(math.pi * at / (settings.epochs * len(order))))
                for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = rate * factor
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                self.steps += 1
                total += value
                if is_told:
                    publish(self.progress, follower.step(self.steps, epoch, value, self.control))
        return total / len(order)

    def _loss(self, batch: Any) -> Tensor:
        result = self.sim.graph.run(self.sim.inputs(batch), self.sim.call)
        logits = float_tensors(result)[0]
        parts = []
        if self.has_labels:
            labels = labels_of(self.sim.graph, batch).to(logits.device)
            given = self.settings.loss
            parts.append(_cross_entropy(logits, labels) if given == "cross_entropy" else given(result, labels))
        if self.teacher is not None:
            with torch.no_grad():
                wanted = float_tensors(self.teacher.float_output(batch))[0]
            parts.append(_divergence(logits, wanted))
        return torch.stack(parts).mean() if parts else logits.sum() * 0

    def _diverged(self, epoch: int, step: int) -> None:
        raise DivergedLoss(
            f"the loss became NaN or infinite in epoch {epoch + 1}, step {step + 1}; the sim is as it was before. "
            f"Use a lower learning rate than {self.settings.learning_rate:g}."
        )

    def _measure(self) -> Any:
        if self.evaluation is None:
            return -math.inf
        return self.sim.evaluate(self.evaluation)

    def _report(self) -> Report:
        name = self._score_name
        if self.evaluation is None:
            summary = f"{len(self.epochs)} epochs, {self.steps} steps, loss {self.epochs[-1]['loss']:.4g}"
        else:
            kept = f"epoch {self.best_epoch} kept" if self.best_epoch else "no epoch was better, weights as before"
            summary = f"{name} {self.start} before, {self.best} after; {kept}"
        values: dict[str, Any] = {
            "before": float(self.start),
            "after": float(self.best),
            "epoch": self.best_epoch,
            "steps": self.steps,
        }
        values["epochs"] = self.epochs
        return Report("QAT", summary, tuple(self._layers()), tuple(self.notes), values, as_done=self._as_done())

    def _as_done(self) -> "QAT | None":
        """The settings that train the same again, where a person changed a layer or ended the training."""
        told = tuple(edit.told() for edit in self.edits)
        if not self._is_cancelled and told == self.settings.edits:
            return None
        ended = len(self.epochs) if self._is_cancelled else self.settings.stop_after
        return replace(self.settings, edits=told, stop_after=ended, control=None)

    def _layers(self) -> Iterator[dict[str, Any]]:
        """How far each weight moved, relative to its size, and the range its output has now."""
        for name, layer in self.sim.layers.items():
            weight, output = layer.weight, layer.output
            if weight is None or id(weight) not in self.before:
                continue
            before = self.before[id(weight)]
            moved = (weight.weight.detach() - before).norm() / before.norm().clamp_min(1e-12)
            row: dict[str, Any] = {"layer": name, "weight moved": float(moved)}
            if output is not None and output.encoding is not None:
                row |= {"low": float(output.encoding.minimum.min()), "high": float(output.encoding.maximum.max())}
            yield row


def _weight_quantizers(sim: QuantSim) -> list[WeightQuantizer]:
    return [q for q in sim.quantizers.values() if isinstance(q, WeightQuantizer)]


def _teacher(sim: QuantSim) -> QuantSim:
    """A frozen copy of the sim before training; its float results are what distillation aims at."""
    teacher = copy.deepcopy(sim).eval()
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


def _has_labels(sim: QuantSim, batch: Any) -> bool:
    try:
        labels_of(sim.graph, batch)
    except InputError:
        return False
    return True


def _size(range_end: Tensor) -> float:
    """The typical magnitude of a range's end, for its learning rate; ends at zero move with the smallest."""
    return max(float(range_end.detach().abs().mean()), 1e-3)


@contextmanager
def _training(sim: QuantSim, batch_norm: str) -> Iterator[None]:
    """Train mode, with BatchNorm statistics frozen unless they should move."""
    sim.train()
    if batch_norm == "frozen":
        for module in sim.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    try:
        yield
    finally:
        sim.eval()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of class scores on the last axis, or on axis 1 of images; labels below 0 are ignored."""
    if logits.dim() > 2 and logits.shape[2:] != labels.shape[1:]:
        logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return F.cross_entropy(logits.float(), labels.clamp_min(-100), ignore_index=-100)


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence from the float model's distribution; the relative squared error where there is no class axis."""
    if logits.dim() < 2 or logits.shape[-1] == 1:
        return (logits - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)
    rows = (t.float().reshape(-1, t.shape[-1]) for t in (logits, wanted))
    own, target = (F.log_softmax(row, -1) for row in rows)
    return F.kl_div(own, target, reduction="batchmean", log_target=True)
