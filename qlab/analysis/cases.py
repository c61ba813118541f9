"""Cases: the configurations that an analysis scores, as data that can be sent to a worker."""

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from qlab.analysis.bits import Bits
from qlab.analysis.units import Unit

MODES = ("enabled", "disabled")
SUMMARY = ("float", "weights only", "activations only", "both")


@dataclass(frozen=True)
class Case:
    """What is quantized, and with how many bits.

    mode: one of SUMMARY, or 'enabled' (only `unit`) or 'disabled' (all but `unit`). bits: None for 'float'.
    """

    mode: str
    bits: Bits | None = None
    unit: Unit | None = None

    @property
    def baseline(self) -> "Case":
        """The case that this one is compared with: all quantized for 'disabled', else nothing."""
        return Case("both", self.bits) if self.mode == "disabled" else Case("float")

    def quantized(self, keys: Set[str]) -> Set[str]:
        """Which of the quantizers with these keys in `sim.quantizers` are on."""
        if self.mode == "both":
            return keys
        if self.mode in ("weights only", "activations only"):
            return {key for key in keys if key.endswith(":weight") == (self.mode == "weights only")}
        if self.unit is None:
            return frozenset()
        return keys & set(self.unit.quantizers) if self.mode == "enabled" else keys - set(self.unit.quantizers)

    def __str__(self) -> str:
        return self.mode if self.unit is None else f"{self.unit} {self.mode}, {self.bits} bits"


def cases_of(units: Sequence[Unit], bits: Sequence[Bits], modes: Iterable[str], summary: bool = True) -> list[Case]:
    """All cases, baselines first, then unit by unit, so that a first picture is complete early."""
    cases = [Case("float")]
    cases += [Case("both", width) for width in bits if summary or "disabled" in modes]
    cases += [Case(mode, width) for width in bits for mode in ("weights only", "activations only") if summary]
    return cases + [Case(mode, width, unit) for width in bits for unit in units for mode in modes]
