"""Safetensors files written whole or not at all."""

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes `tensors` beside `path` and renames the file into place, so that an earlier one is never half replaced.

    Raises OSError, naming `path`, where the system refuses: a full disk, a missing folder, no permission.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside, metadata=metadata)
        os.replace(beside, target)
    except SafetensorError as error:
        reason = re.search(r"\(os error (\d+)\)", str(error))
        if reason is None:
            raise
        number = int(reason[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from None
    finally:
        beside.unlink(missing_ok=True)
