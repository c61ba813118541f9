"""Checkpoints of a training: one file an epoch, from which an interrupted run goes on bit for bit."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qlab.sim.tensor_file import write_tensors
from qlab.techniques.training_control import TrainingEdit

if TYPE_CHECKING:
    from qlab.techniques.qat_run import QATRun

FORMAT = "qlab-qat-1"  # part of the identity: files written otherwise are not read


class Checkpoint:
    """One file an epoch with weights, ranges and optimizer, and a header that tells whose they are; no pickle."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.path, self.identity = folder / "qat.safetensors", identity

    @classmethod
    def open(cls, run: "QATRun") -> "Checkpoint | None":
        if run.settings.checkpoint_dir is None:
            return None
        folder = Path(run.settings.checkpoint_dir)
        folder.mkdir(parents=True, exist_ok=True)
        left_out = ("checkpoint_dir", "on_cancel", "follow", "between_epochs", "stop_after", "control")
        plain = {f.name: str(getattr(run.settings, f.name)) for f in fields(run.settings) if f.name not in left_out}
        digest = hashlib.sha256(json.dumps([FORMAT, plain, len(run.data)], sort_keys=True).encode())
        for name, value in sorted(run.sim.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return cls(folder, digest.hexdigest())

    def write(self, run: "QATRun", epoch: int) -> None:
        tensors = {f"model.{k}": v.detach().contiguous().clone() for k, v in run.sim.state_dict().items()}
        tensors |= {f"best.{k}": v.contiguous() for k, v in run.best_tensors.items()}
        for number, state in run.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{key}"] = torch.as_tensor(value).clone()
        header = {"identity": self.identity, "epoch": epoch, "steps": run.steps, "epochs": run.epochs}
        header |= {"best": float(run.best), "best_epoch": run.best_epoch, "edits": [e.told() for e in run.edits]}
        try:
            write_tensors(self.path, tensors, {"qat": json.dumps(header)})
        except OSError as error:  # a full disk costs the resumption, not the training
            run.notes.append(f"epoch {epoch} could not be kept in {self.path}: {error.strerror}.")

    def resume(self, run: "QATRun") -> int:
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
        for edit in header["edits"]:
            run.edit(TrainingEdit.of(edit))
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
