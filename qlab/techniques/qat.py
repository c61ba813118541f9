"""Quantization-aware training: the weights learn to live with the grid.

The loss is computed through the simulation, gradients pass the rounding straight through. The state with the best
score is kept. Sources: Jacob et al. 2018, arXiv:1712.05877 (training through the simulation); Esser et al. 2020,
arXiv:1902.08153 and Jain et al. 2020, arXiv:1903.08066 (learning ranges).
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qlab.errors import Cancelled, InputError, QlabError
from qlab.progress import Progress, publish
from qlab.quantization import WeightQuantizer
from qlab.settings import setting
from qlab.sim import QuantSim, Snapshot
from qlab.sim.batches import Batches, labels_of
from qlab.sim.evaluate import evaluation_of, float_tensors
from qlab.sim.tensor_file import write_tensors
from qlab.sim.training import collapsed_ranges
from qlab.techniques.technique import Report, Technique


class DivergedLoss(QlabError, ArithmeticError):
    """The loss became NaN or infinite; the last good state is restored."""


@dataclass(frozen=True)
class TrainingStep:
    """What a view draws: published after steps (score None) and epochs.

    step: optimizer steps so far, over all epochs. loss: of that batch, or the mean of the epoch. ranges: (low, high)
    and share of clipped values of the layer that the view follows, by `QAT.follow`.
    """

    step: int
    epoch: int
    loss: float
    score: float | None = None
    layer: str | None = None
    low: float = math.nan
    high: float = math.nan
    clipped: float = math.nan


@dataclass(frozen=True)
class QAT(Technique):
    """Fine-tunes weights (and ranges) with quantization in the loop.

    What: a few epochs of Adam through the simulation, learning rate annealed by a cosine. When: after the techniques
    without training, when the score is still short and a training set is at hand; at 4 bits it gains most. Cost: about
    1.5 to 2 times that of float training. `apply(sim, labelled)` takes batches of (x, y); without labels only
    `distill` can train. The sim stays in float where a quantizer is off. `loss` may be any function of (result,
    labels). `between_epochs(sim, epoch)` is called before each epoch: freeze a layer, give it other bits.
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
    between_epochs: Any = setting(None, "called as between_epochs(sim, epoch)", hidden=True)  # noqa: RUF009

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`; see `apply`."""
        assert batches is not None
        data = list(batches)
        if not data:
            raise InputError("QAT needs at least one batch; the iterable was empty.")
        if not self.distill or self.loss != "cross_entropy":
            labels_of(sim.graph, data[0])
        return _Run(self, sim, data, score, progress).train()


class _Run:
    """One training run: its optimizer, its best state, its checkpoints."""

    def __init__(self, settings: QAT, sim: QuantSim, data: list[Any], score: Any, progress: Progress) -> None:
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
        self.steps = 0
        self.epochs: list[dict[str, Any]] = []
        self.before = {id(q): q.weight.detach().clone() for q in _weight_quantizers(sim)}
        self.best = self._measure()
        self.start = self.best
        self._keep(0)

    def train(self) -> Report:
        settings, sim = self.settings, self.sim
        checkpoint = _Checkpoint.open(self)
        first = checkpoint.resume(self) if checkpoint else 0
        try:
            for epoch in range(first, settings.epochs):
                if settings.between_epochs is not None:
                    settings.between_epochs(sim, epoch)
                loss = self._epoch(epoch)
                value = self._measure() if self.evaluation is not None else -loss
                self.epochs.append({"epoch": epoch + 1, "loss": loss, self._score_name: float(value)})
                publish(self.progress, TrainingStep(self.steps, epoch, loss, float(value)))
                if self.evaluation is None or value >= self.best:
                    self.best = value
                    self._keep(epoch + 1)
                if checkpoint:
                    checkpoint.write(self, epoch + 1)
        except Cancelled:
            if settings.on_cancel == "restore" or not self.epochs:
                raise
            self.notes.append(f"cancelled in epoch {len(self.epochs) + 1}; the best epoch so far is kept")
        self.best_state.restore()
        collapsed = collapsed_ranges(sim)
        if collapsed:
            self.notes.append(f"ranges at their bounds: {', '.join(collapsed[:5])}; they were kept valid")
        sim.qat(None)
        sim.eval()
        return self._report()

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
                if self.steps % 5 == 0:
                    publish(self.progress, self._step(epoch, value))
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

    def _step(self, epoch: int, loss: float) -> TrainingStep:
        name = self.settings.follow
        if name is None or (quantizer := self.sim[name].output) is None or quantizer.encoding is None:
            return TrainingStep(self.steps, epoch, loss)
        encoding, sample = quantizer.encoding, quantizer.statistics
        low, high = float(encoding.minimum.min()), float(encoding.maximum.max())
        clipped = math.nan
        if not sample.is_empty:
            seen = sample.sample()
            outside = (seen.values < low) | (seen.values > high)
            clipped = float((seen.counts * outside).sum() / seen.counts.sum())
        return TrainingStep(self.steps, epoch, loss, None, name, low, high, clipped)

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
        return Report("QAT", summary, tuple(self._layers()), tuple(self.notes), values)

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


class _Checkpoint:
    """One file an epoch with weights, ranges and optimizer, and a header that tells whose they are; no pickle."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path, self.identity = folder / "qat.safetensors", identity

    @classmethod
    def open(cls, run: _Run) -> "_Checkpoint | None":
        if run.settings.checkpoint_dir is None:
            return None
        folder = Path(run.settings.checkpoint_dir)
        folder.mkdir(parents=True, exist_ok=True)
        left_out = ("checkpoint_dir", "on_cancel", "follow", "between_epochs")
        plain = {f.name: str(getattr(run.settings, f.name)) for f in fields(run.settings) if f.name not in left_out}
        digest = hashlib.sha256(json.dumps([plain, len(run.data)], sort_keys=True).encode())
        for name, value in sorted(run.sim.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return cls(folder, digest.hexdigest())

    def write(self, run: _Run, epoch: int) -> None:
        tensors = {f"model.{k}": v.detach().contiguous().clone() for k, v in run.sim.state_dict().items()}
        tensors |= {f"best.{k}": v.contiguous() for k, v in run.best_tensors.items()}
        for number, state in run.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{key}"] = torch.as_tensor(value).clone()
        header = {"identity": self.identity, "epoch": epoch, "steps": run.steps, "epochs": run.epochs}
        header |= {"best": float(run.best), "best_epoch": run.best_epoch}
        try:
            write_tensors(self.path, tensors, {"qat": json.dumps(header)})
        except OSError as error:  # a full disk costs the resumption, not the training
            run.notes.append(f"epoch {epoch} could not be kept in {self.path}: {error.strerror}.")

    def resume(self, run: _Run) -> int:
        """Changes `run` to where the checkpoint left off; the number of finished epochs, 0 where none fits."""
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("qat", "{}"))
            tensors = load_file(self.path)
        except (SafetensorError, json.JSONDecodeError, OSError):
            run.notes.append(f"{self.path} is damaged; training started anew")
            return 0
        if header.get("identity") != self.identity:
            run.notes.append(f"{self.path} belongs to other settings or weights; training started anew")
            return 0
        run.sim.load_state_dict(_part(tensors, "best."))
        run.best = run._measure() if run.evaluation is not None else header["best"]
        run._keep(header["best_epoch"])
        run.sim.load_state_dict(_part(tensors, "model."))
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".", 2)
                states.setdefault(int(number), {})[name] = value
        whole = run.optimizer.state_dict()
        whole["state"] = states
        run.optimizer.load_state_dict(whole)
        run.steps, run.epochs = header["steps"], header["epochs"]
        return int(header["epoch"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


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
