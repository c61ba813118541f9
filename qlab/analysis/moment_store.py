"""Moments that stay with a sim, so that weights can be rounded again without data.

They are found again only as long as they hold: the float model up to and with the layer must be what it was.
"""

from typing import Any

from qlab.analysis.moments import Moments
from qlab.sim import QuantSim


class MomentStore:
    """Moments of a sim's layers by name, each with the key of the float model that they belong to."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Moments]] = {}

    @classmethod
    def of(cls, sim: QuantSim) -> "MomentStore":
        """The store that belongs to `sim`. A deep copy of the sim shares the moments; files and pickles leave them."""
        return sim.__dict__.setdefault("moment_store", cls())

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(moments.bytes for _, moments in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, name: str, key: str, moments: Moments, max_bytes: int) -> bool:
        """Keeps the moments of layer `name`, in place of earlier ones, if all fit in `max_bytes`; whether they do."""
        self._kept.pop(name, None)
        fits = self.bytes + moments.bytes <= max_bytes
        if fits:
            self._kept[name] = key, moments
        return fits

    def find(self, name: str, key: str) -> Moments | None:
        """The moments of layer `name`, None where there are none for this key."""
        kept, moments = self._kept.get(name, ("", None))
        return moments if kept == key else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "MomentStore":
        twin = MomentStore()
        twin._kept = dict(self._kept)
        return twin

    def __reduce__(self) -> Any:
        return MomentStore, ()
