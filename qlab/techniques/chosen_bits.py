"""Bits chosen by hand, or off a front, for many layers: one change, one step of a history, one line of a script."""

from dataclasses import dataclass
from typing import Any, ClassVar

from qlab.analysis.shadow import set_bits
from qlab.progress import Progress
from qlab.settings import setting
from qlab.sim import QuantSim
from qlab.sim.batches import Batches
from qlab.techniques.technique import Report, Technique


@dataclass(frozen=True)
class _ChosenBits(Technique):  # the underscore keeps it out of TECHNIQUES: nobody fills its form by hand
    """Gives quantizers the bits of `settings`: (layer, part, bits) each, as `Point.settings` of MixedPrecision."""

    needs_data: ClassVar[bool] = False

    settings: Any = setting((), "(layer, part, bits) of each quantizer", hidden=True)  # noqa: RUF009
    label: str = setting("", "what the configuration is called", hidden=True)

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`: sets the bits."""
        rows = []
        for number, (layer, part, bits) in enumerate(self.settings):
            progress.step(number, len(self.settings), layer)
            quantizer = getattr(sim[layer], part)
            rows.append({"layer": layer, "part": part, "bits": bits, "before": quantizer.bits})
            set_bits(quantizer, bits)
        changed = sum(row["bits"] != row["before"] for row in rows)
        return Report("ChosenBits", f"{self.label or 'configuration'}: {changed} widths changed", tuple(rows))
