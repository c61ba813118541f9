"""What AutoQuant found: the best sim, every stage with its score and reason, a report and a folder to leave with."""

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlab.errors import InputError
from qlab.graph.findings import Findings
from qlab.progress import Progress
from qlab.sim import QuantSim
from qlab.sim.files import load_state
from qlab.techniques.stage_store import require_writable
from qlab.techniques.stages import StageRecord, stage_table
from qlab.techniques.technique import Report

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class AutoQuantResult(Report):
    """The outcome of AutoQuant.

    sim: the best found, new and independent of what was given; None only where the model could not be captured.
    best: the stage that it comes from. records: all stages in order. target: None where there was none to meet.
    float_score: of the float model. findings: the validator's, where a model was given and not a sim.
    """

    sim: QuantSim | None = None
    best: StageRecord | None = None
    records: tuple[StageRecord, ...] = ()
    lineage: tuple[str, ...] = ()
    target: float | None = None
    float_score: float = math.nan
    score_name: str = "score"
    cancelled: bool = False
    findings: Findings | None = None

    @property
    def is_target_met(self) -> bool:
        """Whether the best reaches the target."""
        return self.best is not None and self.target is not None and self.best.score >= self.target

    @property
    def stages(self) -> "pd.DataFrame":
        """One row a stage with the fields of StageRecord, and is_best for those that lead to the result."""
        return stage_table(self.records, self.lineage)

    def adopt(self, sim: QuantSim, progress: Progress | None = None) -> None:
        """Changes `sim`, the one that AutoQuant was given, to the best found. In a lab: `lab.run(result.adopt)`."""
        with tempfile.TemporaryDirectory(prefix="qlab-") as folder:
            path = Path(folder) / "best.safetensors"
            self._found().save(path)
            load_state(sim, path)

    def plot(self) -> Any:
        """The stages as a tree."""
        from qlab.plots import decision_tree

        return decision_tree(self.stages, score_name=self.score_name, target=self.target)

    def save(self, folder: str | os.PathLike[str], batches: Any = None) -> Path:
        """Writes the exported model with its encodings, sim.safetensors and report.html into `folder`.

        batches: where given, the exported file runs on them in ONNX Runtime, and the report says how far that is from
        the sim. Everything is written beside first and then renamed into place, file by file. Raises InputError where
        the folder cannot be written or there is no sim to save, and what the export raises, once the rest is saved.
        """
        sim, target = self._found(), require_writable(folder)
        beside = Path(tempfile.mkdtemp(dir=target, prefix=".", suffix=".part"))
        try:
            sim.save(beside / "sim.safetensors")
            told: list[Any] = []
            try:
                sim.export(beside / "model")
                if batches is not None:
                    told = _on_target(sim, beside / "model.onnx", batches)
            except Exception as error:
                told = [f"{type(error).__name__}: {error}"]
                raise
            finally:  # what cannot be exported can still be loaded and read about
                self._write_report(beside / "report.html", told)
                for file in sorted(beside.iterdir()):
                    file.replace(target / file.name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return target

    def __repr__(self) -> str:
        lines = [f"{self.technique}: {self.summary}"]
        if self.records:
            shown = self.stages[["stage", "score", "gain", "seconds", "verdict", "reason"]]
            lines.append(shown.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep=""))
        return "\n".join(lines + [f"- {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{escape(self.technique)}</b>: {escape(self.summary)}</p>"]
        if self.records:
            shown = self.stages.drop(columns=["parent", "technique"])
            parts.append(shown.to_html(index=False, float_format=lambda v: f"{v:.4f}", na_rep="", border=0))
            parts.append(self.plot()._repr_mimebundle_()["text/html"])
        if self.findings:
            is_open = " open" if self.sim is None else ""
            parts.append(f"<details{is_open}><summary>Findings</summary>{self.findings._repr_html_()}</details>")
        if self.notes:
            parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in self.notes) + "</ul>")
        return "".join(parts)

    def _found(self) -> QuantSim:
        if self.sim is None:
            raise InputError(f"AutoQuant found no sim: {self.summary}")
        return self.sim

    def _write_report(self, path: Path, on_target: list[Any]) -> None:
        from qlab.plots.report import Section, save_html

        sim = self._found()
        sections = [
            Section("Outcome", ("\n\n".join([self.summary, *self.notes]),)),
            Section("Stages", (self.plot(), self.stages)),
            *([Section("Findings", (self.findings.to_pandas(),))] if self.findings else []),
            *([Section("On target", on_target)] if on_target else []),
            Section("Quantizers", (sim.to_pandas(),)),
            Section("Coverage", (sim.coverage(),)),
        ]
        save_html(path, "AutoQuant", sections)


def _on_target(sim: QuantSim, path: Path, batches: Any) -> list[Any]:
    """What ONNX Runtime makes of the exported file, for a section of the report."""
    from qlab.export.on_target import on_target  # ONNX Runtime takes a while to load

    found = on_target(sim, path, batches)
    sentence = f"{found.runtime}: {found.identical:.2%} of the result's integers are the sim's."
    return ["\n\n".join([sentence, *found.notes]), found.outputs, found.summary]
