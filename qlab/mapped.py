"""Weights that stay in their file: mapped into memory, read when a layer runs, let go of when it has run.

A mapped tensor is an ordinary tensor whose memory is a private mapping of a file: what is written to it never reaches
the file. Its pages come in when they are read and may leave again at any time, so a model needs memory for the layer
at work and not for all of them. Pages that were written to stay in memory.
"""

import contextlib
import json
import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qlab.errors import InputError

_CHUNK = 1 << 20
_PAGEOUT = 21  # of madvise, Linux 5.4: pages leave now, none is lost; Python has no name for it
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Types of numbers by their names in a safetensors file."""


@dataclass(frozen=True, eq=False)
class _Region:
    """Where a tensor lies: from byte `start` of a mapped file, which `again` maps anew."""

    pages: mmap.mmap
    file: Any
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def tensor(self) -> Tensor:
        """The tensor of these bytes, known as mapped."""
        flat = torch.frombuffer(self.pages, dtype=self.dtype, count=self.numel, offset=self.start)
        return _known(flat.view(self.shape), self)

    def again(self) -> "_Region":
        """The same bytes as they are in the file, in a mapping of their own."""
        return _Region(_map(self.file), self.file, self.start, self.dtype, self.shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the file has the values of `tensor`. It is read, not mapped: pages mapped twice could not leave."""
        if tensor.device.type != "cpu" or (tensor.dtype, tuple(tensor.shape)) != (self.dtype, self.shape):
            return False
        values = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK]
            if os.pread(self.file.fileno(), len(part), self.start + start) != part:
                return False
        return True

    def let_go(self) -> None:
        first = self.start // mmap.PAGESIZE * mmap.PAGESIZE
        length = self.start + self.numel * self.dtype.itemsize - first
        with contextlib.suppress(OSError, AttributeError):  # elsewhere the system does it when memory is short
            self.pages.madvise(_PAGEOUT, first, length)


_regions: Any = WeakTensorKeyDictionary()


def map_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Changes `model`: parameters and buffers become those of the safetensors file at `path`, read when they are used.

    Build the model without memory first: `with torch.device("meta"): model = Net()`. Buffers that are not in its state
    dict must be built outside of that context. A QuantSim of such a model maps the file, too; `sim.calibrate` and the
    techniques that go from layer to layer (AdaRound, GPTQ, SequentialMSE, BiasCorrection) then hold one layer at a
    time. Raises InputError where the file lacks a tensor or has another shape or type.
    """
    regions = _read(path)
    state = model.state_dict(keep_vars=True)
    missing = [name for name in state if name not in regions and not _is_tied(name, state, regions)]
    if missing:
        raise InputError(f"{os.fspath(path)!r} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}.")
    found: dict[int, Tensor] = {}  # tied weights stay tied
    for name, old in state.items():
        if name in regions and id(old) not in found:
            region = regions[name]
            if (region.dtype, region.shape) != (old.dtype, tuple(old.shape)):
                raise InputError(
                    f"{name!r} is {old.dtype} {list(old.shape)} in the model and {region.dtype} {list(region.shape)} "
                    f"in {os.fspath(path)!r}."
                )
            value = region.tensor()
            if isinstance(old, nn.Parameter):
                value = _known(nn.Parameter(value, old.requires_grad), region)
            found[id(old)] = value
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is not None and id(old) in found:
                    store[name] = found[id(old)]
        if any(map(is_mapped, _own_tensors(module))):
            module.register_forward_hook(_after_use)


def is_mapped(tensor: Tensor) -> bool:
    """Whether the tensor lies in a file."""
    return tensor in _regions


def let_go(*tensors: Tensor) -> None:
    """Lets the memory of mapped tensors go until they are read again; nothing for others."""
    for tensor in tensors:
        region = _regions.get(tensor)
        if region is not None:
            region.let_go()


def duplicate(tensor: Tensor) -> Tensor:
    """An independent copy, without gradient; of a mapped tensor that nobody has written to, another mapping."""
    region = _regions.get(tensor)
    return tensor.detach().clone() if region is None or not _is_unwritten(tensor) else region.again().tensor()


def is_unchanged(tensor: Tensor, copy: Tensor) -> bool:
    """Whether `tensor` still equals its duplicate, bit for bit."""
    if is_mapped(tensor) and is_mapped(copy) and _is_unwritten(tensor):
        return True
    return tensor.shape == copy.shape and torch.equal(tensor, copy)


def _is_unwritten(tensor: Tensor) -> bool:
    same = _regions[tensor].holds(tensor)
    let_go(tensor)
    return same


def mapped_twins(model: nn.Module) -> dict[int, Tensor]:
    """What deepcopy needs to know so that it maps anew what is mapped: its memo, by id of the tensor."""
    found: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if is_mapped(tensor):
            copy = duplicate(tensor)
            if isinstance(tensor, nn.Parameter):
                region = _regions.get(copy)
                copy = nn.Parameter(copy, tensor.requires_grad)
                copy = copy if region is None else _known(copy, region)
            found[id(tensor)] = copy
    return found


def in_file(tensor: Tensor) -> Tensor:
    """The same values in a temporary file without a name, which is gone when the tensor is."""
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.numel():
        return tensor
    file = tempfile.TemporaryFile(prefix="qlab-")  # noqa: SIM115  it lives as long as its mapping
    file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    file.flush()
    return _Region(_map(file), file, 0, tensor.dtype, tuple(tensor.shape)).tensor()


def _after_use(module: nn.Module, args: Any, output: Any) -> None:
    let_go(*_own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _is_tied(name: str, state: dict[str, Tensor], regions: dict[str, _Region]) -> bool:
    return any(other in regions and value is state[name] for other, value in state.items())


def _known(tensor: Any, region: _Region) -> Any:
    _regions[tensor] = region
    return tensor


def _map(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read(path: str | os.PathLike[str]) -> dict[str, _Region]:
    """Where each tensor of a safetensors file lies; raises InputError where it is no such file.

    Eight bytes of length, a JSON header of {name: dtype, shape, data_offsets}, then the tensors' bytes.
    """
    file = open(path, "rb")  # noqa: SIM115  it lives as long as its mapping
    try:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        pages, found = _map(file), {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            region = _Region(pages, file, 8 + length + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if end - begin != region.numel * region.dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name!r} does not lie in the file")
            found[name] = region
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        file.close()
        raise InputError(f"{os.fspath(path)!r} is not a readable safetensors file: {error}.") from None
    return found
