"""Moments that stay with a sim, so that weights can be rounded again without data.

They are found again only as long as they hold: the float model up to and with the layer must be what it was. Where the
layers before it have been rounded otherwise since, what remains true is how its inputs vary, not what they miss.
"""

from typing import Any

from qlab.analysis.moments import Moments
from qlab.graph import Layer
from qlab.sim import QuantSim
from qlab.sim.content import keys_in_order


class InputKeys:
    """What a value in the sim depends on, as a key; asked for in order of execution, also while the sim is changed.

    A key holds weights as they are rounded and the bits of activations, not the ranges measured of these.
    """

    def __init__(self, sim: QuantSim) -> None:
        self._keys: dict[str, str] = {}
        self._rest = keys_in_order(sim, ranges=False)

    def of(self, source: Layer) -> str:
        """The key of the value of `source` as the layers up to it are now, or were when it was first asked for."""
        while source.name not in self._keys:
            name, key = next(self._rest)
            self._keys[name] = key
        return self._keys[source.name]


class MomentStore:
    """Moments of a sim's layers by name, with the keys of the float model and of the inputs that they belong to."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, str, Moments]] = {}

    @classmethod
    def of(cls, sim: QuantSim) -> "MomentStore":
        """The store that belongs to `sim`. A deep copy of the sim shares the moments; files and pickles leave them."""
        return sim.__dict__.setdefault("moment_store", cls())

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(moments.bytes for *_, moments in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, name: str, key: str, inputs: str, moments: Moments, max_bytes: int) -> bool:
        """Keeps the moments of layer `name`, in place of earlier ones, if all fit in `max_bytes`; whether they do.

        key: of the layer in the float model. inputs: of what it reads in the sim.
        """
        self._kept.pop(name, None)
        fits = self.bytes + moments.bytes <= max_bytes
        if fits:
            self._kept[name] = key, inputs, moments
        return fits

    def find(self, name: str, key: str) -> Moments | None:
        """The moments of layer `name`, None where there are none for this key."""
        kept, _, moments = self._kept.get(name, ("", "", None))
        return moments if kept == key else None

    def are_of(self, name: str, inputs: str) -> bool:
        """Whether the moments of layer `name` were measured on inputs of this key."""
        return name in self._kept and self._kept[name][1] == inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> "MomentStore":
        twin = MomentStore()
        twin._kept = dict(self._kept)
        return twin

    def __reduce__(self) -> Any:
        return MomentStore, ()
