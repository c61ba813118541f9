"""What was done to a sim as a whole, in order: made or loaded, calibrated, techniques. A script can be told from it.

Each entry holds the settings of all quantizers before and after, so that settings made in between are known as well.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlab.mapped import let_go
from qlab.quantization import Encoding, Quantizer, QuantSpec

if TYPE_CHECKING:
    from qlab.sim.quant_sim import QuantSim

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes a number to integers of that size


@dataclass(frozen=True, eq=False)
class Setting:
    """What is asked of one quantizer; its grid too where that is frozen."""

    spec: QuantSpec
    enabled: bool
    frozen: bool
    encoding: Encoding | None


@dataclass(frozen=True, eq=False)
class Marks:
    """A sim at one moment: settings by quantizer, and a checksum of its weights that notices any change of a bit."""

    settings: dict[str, Setting]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, sim: "QuantSim") -> "Marks":
        """The marks of `sim` as it is now."""
        settings = {}
        for name, quantizer in sim.quantizers.items():
            assert isinstance(quantizer, Quantizer)
            encoding = quantizer.encoding if quantizer.frozen else None
            settings[name] = Setting(quantizer.spec, quantizer.enabled, quantizer.frozen, encoding)
        tensors = (*sim.model.parameters(), *sim.model.buffers())
        return cls(settings, tuple(map(_checksum, tensors)))


@dataclass(frozen=True, eq=False)
class LogEntry:
    """One thing done to the whole sim.

    what: 'new', 'load' or 'calibrate', or the technique that was applied. batches, score: what it was given (for 'load'
    the path). before, after: the sim around it.
    """

    what: Any
    batches: Any
    score: Any
    before: Marks
    after: Marks

    def __deepcopy__(self, memo: dict[int, Any]) -> "LogEntry":
        return self  # a copied sim has the same past, and shares the data that it speaks of

    def __reduce__(self) -> Any:
        """Sent elsewhere, an entry leaves the data behind, and of a technique it keeps the name."""
        what = self.what if isinstance(self.what, str) else type(self.what).__name__
        return LogEntry, (what, None, None, self.before, self.after)


def _checksum(tensor: torch.Tensor) -> int:
    """The sum of the bits read as integers, eight bytes at a time where they fit; overflow wraps, which is exact."""
    if not tensor.numel():
        return 0
    size = tensor.element_size()
    flat = tensor.detach().contiguous().view(-1)
    whole = _WHOLE[8 if size * flat.numel() % 8 == 0 else size]
    found = int(flat.view(whole).sum(dtype=whole))
    let_go(tensor)
    return found
