"""What every technique has in common: settings, a transaction around its work, and a report.

A technique is a frozen dataclass whose fields are declared with `setting`; it implements `run`. `apply` runs it under a
snapshot: an exception, Cancel or Ctrl-C leaves the sim as it was. Subclasses register themselves, so a technique
written in a notebook cell appears in the dashboard with its form.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from qlab.errors import NeedsCapture
from qlab.progress import Progress, Silent
from qlab.settings import check
from qlab.sim import QuantSim
from qlab.sim.batches import Batches
from qlab.sim.evaluate import Evaluation
from qlab.sim.log import LogEntry, Marks
from qlab.sim.snapshot import transaction

if TYPE_CHECKING:
    import pandas as pd

TECHNIQUES: "dict[str, type[Technique]]" = {}
"""Every technique by class name, in order of definition; one defined again replaces the earlier one."""


@dataclass(frozen=True)
class Report:
    """What a technique did.

    technique: its name. summary: one sentence. rows: one dict a layer, with 'layer', what changed and what it gained.
    notes: what was left out and why, what a later step must know. values: numbers for code. seconds: wall time.
    as_done: the technique with the settings that do the same again, where a person steered or ended it; None elsewhere.
    """

    technique: str
    summary: str
    rows: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    as_done: "Technique | None" = None

    @property
    def layers(self) -> "pd.DataFrame":
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame(list(self.rows))

    def __repr__(self) -> str:
        lines = [f"{self.technique}: {self.summary}"]
        if self.rows:
            lines.append(self.layers.to_string(index=False, float_format=lambda v: f"{v:.4g}", max_rows=40))
        return "\n".join(lines + [f"- {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        from html import escape

        parts = [f"<p><b>{escape(self.technique)}</b>: {escape(self.summary)}</p>"]
        if self.rows:
            table = self.layers.to_html(index=False, float_format=lambda v: f"{v:.4g}", max_rows=40, border=0)
            parts.append(table)  # pandas escapes cells
        if self.notes:
            parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in self.notes) + "</ul>")
        return "".join(parts)


@dataclass(frozen=True)
class Technique:
    """Changes a sim to make it better; settings are the fields.

    needs_data, needs_labels, needs_score: what `apply` must be given; a form asks for it. deprecated: why, where the
    technique is kept for completeness.
    """

    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_score: ClassVar[bool] = False
    deprecated: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__name__.startswith("_"):
            TECHNIQUES[cls.__name__] = cls

    def __post_init__(self) -> None:
        check(self)

    def apply(
        self,
        sim: QuantSim,
        batches: Any = None,
        score: "Evaluation | Any" = None,
        progress: Progress | None = None,
    ) -> Report:
        """Changes `sim`; returns what changed, layer by layer. On any error, or when cancelled, `sim` is as it was.

        batches: any iterable of inputs, labelled where the technique needs labels. score: an evaluation or function.
        """
        data = self._data(batches)
        before, started = Marks.of(sim), time.perf_counter()
        steps = len(sim.log)
        try:
            with transaction(sim):
                report = self.run(sim, data, score, progress or Silent())
                after = Marks.of(sim)
                done = report.as_done or self
                sim.log[steps:] = [LogEntry(done, batches, score, before, after)]  # in place of what it did within
        except NeedsCapture as error:
            raise NeedsCapture(f"{type(self).__name__} is off for this sim: {error}") from None
        return dataclasses.replace(report, seconds=time.perf_counter() - started)

    def run(self, sim: QuantSim, batches: Batches | None, score: Any, progress: Progress) -> Report:
        """Changes `sim`; implemented by each technique. May raise at any point: `apply` restores the sim."""
        raise NotImplementedError

    def _data(self, batches: Any) -> Batches | None:
        from qlab.errors import InputError

        if batches is None:
            if self.needs_data:
                name = type(self).__name__
                raise InputError(f"{name} needs data: {name}().apply(sim, batches) with any iterable of inputs.")
            return None
        return Batches(batches)
