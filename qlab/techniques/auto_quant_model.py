"""AutoQuant's first stage, for a model: validate it, prepare a copy where that mends something, capture what comes out.

Preparing changes how a model is written and nothing that it computes, so it is kept without asking a score.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from qlab.errors import CaptureError
from qlab.graph.findings import Finding, Findings, Severity
from qlab.graph.prepare import prepare
from qlab.sim import Preset, QuantSim
from qlab.sim.validate import validate

_TOLD = 3  # findings in one line of the table
_MENDED = ("QL201", "QL203")  # what `prepare` mends: modules that are called again, dropout that is frozen


@dataclass(frozen=True)
class Admitted:
    """What the first stage makes of a model.

    sim: None where the model cannot be captured; error says why. findings: the validator's, of the model as it was
    given. reason: for the table of stages. note: for the person who loads the result, '' for none.
    """

    sim: QuantSim | None
    findings: Findings
    reason: str
    note: str = ""
    error: Exception | None = None


def admit(model: nn.Module, example: Any, preset: Preset | None) -> Admitted:
    """The sim of `model`, or of a prepared copy of it where that has fewer findings; `model` is not changed.

    A reused module without weights is no reason to prepare: each of its calls has a grid of its own as it is. Raises
    what the capture raises though validation found no error.
    """
    findings = validate(model, example, preset)
    mended: list[Finding] = []
    found, told = findings, ""
    if any(map(_is_worth_it, findings)):
        try:
            prepared = prepare(model, example)
            found = validate(prepared, example, preset)
            left = {(finding.code, finding.what) for finding in found}
            mended = [f for f in findings if _is_worth_it(f) and (f.code, f.what) not in left]
            sim = QuantSim(prepared, example, preset) if mended else None
        except Exception as error:  # noqa: BLE001  the table shows it, and the model goes on as it is
            sim, mended, found = None, [], findings
            told = f"; not prepared, for qlab.prepare failed: {type(error).__name__}: {error}"
        if sim is not None:
            reason = f"prepared a copy, which mends {_listed(mended)}; left: {_listed(found)}"
            note = (
                "the sim is of qlab.prepare(model, example): qlab.load(file, ...) asks for that in the model's place."
            )
            return Admitted(sim, findings, reason, note)
    try:
        return Admitted(QuantSim(model, example, preset), findings, _listed(findings) + told)
    except Exception as error:
        if findings.ok and not isinstance(error, CaptureError):
            raise
        return Admitted(None, findings, str(error), error=error)


def _is_worth_it(finding: Finding) -> bool:
    """Whether preparing a copy may mend it, and it costs something."""
    return finding.code in _MENDED and finding.severity is not Severity.HINT


def _listed(findings: "Findings | list[Finding]") -> str:
    told = [f"{finding.code} {finding.layer or ''}: {finding.what}".replace(" :", ":") for finding in findings]
    more = f"; and {len(told) - _TOLD} more, see result.findings" if len(told) > _TOLD else ""
    return ("; ".join(told[:_TOLD]) or "nothing to mend") + more
