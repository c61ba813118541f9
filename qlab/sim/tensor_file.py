"""Safetensors files written whole or not at all, one tensor after the other: no copy of all of them is made."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.mapped import DTYPES, let_go

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes `tensors` beside `path` and renames the file into place, so that an earlier one is never half replaced.

    Raises OSError, naming `path`, where the system refuses: a full disk, a missing folder, no permission.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    # The widest numbers first, as the format wants it, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in ordered:
        value = tensors[name]
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    try:
        with beside.open("wb") as file:
            file.write(len(told).to_bytes(8, "little") + told)
            for name in ordered:
                value = tensors[name].detach().cpu().contiguous()
                file.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
                let_go(tensors[name])
        os.replace(beside, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        beside.unlink(missing_ok=True)
