"""Finished layers on disk: an interrupted run goes on where it was.

Each result is a file named by what it depends on: settings, data, and the sim before and with the layer. A file that
is damaged, or holds something else, is not used.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlab.quantization import Encoding, WeightQuantizer
from qlab.sim import Batches, QuantSim
from qlab.sim.content import content_keys, update_with_tensor
from qlab.sim.tensor_file import write_tensors

FORMAT = "qlab-rounding-1"


class RoundingCache:
    """A folder of finished layers.

    damaged: how many files were there and could not be used. refused: how many could not be written; reason: why.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.damaged = 0
        self.refused, self.reason = 0, ""

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None) -> "RoundingCache | None":
        """The cache in `folder`, which is created; None for None."""
        if folder is None:
            return None
        Path(folder).mkdir(parents=True, exist_ok=True)
        return cls(Path(folder))

    @staticmethod
    def keys(settings: str, sim: QuantSim, names: Iterable[str], batches: Batches) -> dict[str, str]:
        """The key of each layer in `names`, which are in order of execution. Reads the batches once."""
        digest = hashlib.sha256(f"{FORMAT} {settings}".encode())
        for batch in batches:
            for value in sim.inputs(batch):
                if isinstance(value, Tensor):
                    update_with_tensor(digest, value)
                else:
                    digest.update(repr(value).encode())
        of_sim, found = content_keys(sim), {}
        for name in names:
            inputs = [of_sim[source.name] for source in sim.graph[name].inputs]
            digest.update(repr([name, of_sim[name], inputs]).encode())  # and the layers rounded before
            found[name] = digest.hexdigest()
        return found

    def save(self, key: str, quantizer: WeightQuantizer, row: dict[str, Any]) -> None:
        """Writes the state of a finished layer; where the disk refuses, that is counted and nothing is lost."""
        encoding = quantizer.required_encoding()
        tensors = {"scale": encoding.scale, "zero_point": encoding.zero_point}
        if quantizer.rounding is not None:
            tensors["codes"] = quantizer.rounding
            if quantizer.bias_correction is not None:
                tensors["bias_correction"] = quantizer.bias_correction
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        limits = [encoding.qmin, encoding.qmax, encoding.axis, encoding.block_size, encoding.block_axis]
        header = {"key": key, "row": row, "encoding": limits}
        header["digest"] = _digest(header, tensors)
        try:
            write_tensors(self._folder / f"{key}.safetensors", tensors, {"qlab": json.dumps(header)})
        except OSError as error:  # a full disk costs the resumption, not the work
            self.refused, self.reason = self.refused + 1, error.strerror or str(error)

    def load(self, key: str, quantizer: WeightQuantizer) -> dict[str, Any] | None:
        """Changes `quantizer` to a kept result and returns its report row; None where there is none to use."""
        file = self._folder / f"{key}.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["qlab"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if header.pop("digest") != _digest(header, tensors) or header["key"] != key:
                raise ValueError("holds something else than its name says")
            encoding, row = Encoding(tensors["scale"], tensors["zero_point"], *header["encoding"]), header["row"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            self.damaged += 1
            return None
        device = quantizer.weight.device
        quantizer.keep_learned_range()
        quantizer.set_rounding(None)
        quantizer.set_bias_correction(None)
        if not encoding.equals(quantizer.required_encoding().to("cpu")):
            quantizer.encoding = encoding.to(device)
        if "codes" in tensors:
            correction = tensors.get("bias_correction")
            quantizer.set_rounding(tensors["codes"].to(device), None if correction is None else correction.to(device))
        else:
            quantizer.frozen = True
        return row


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        update_with_tensor(digest, value)
    return digest.hexdigest()
