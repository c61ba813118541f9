"""Findings: what validation has to say of a model, where, why it matters for quantization, and how to mend it.

A rule is one function with a code. Adding one is writing a function under `@rules.rule(...)` and its section in
docs/validator.md.
"""

import enum
import html
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    import pandas as pd


class Severity(enum.Enum):
    """How much a finding matters, the worst first."""

    ERROR = "error"  # the model cannot be captured, or computes nonsense
    WARNING = "warning"  # it can be quantized, but something is lost or left out
    HINT = "hint"  # worth knowing


@dataclass(frozen=True)
class Finding:
    """One thing found. layer: its name in the captured model, None where there is none. location: 'file:line' or ''."""

    code: str
    severity: Severity
    layer: str | None
    location: str
    what: str
    why: str
    remedy: str

    def __str__(self) -> str:
        where = " at ".join(part for part in (repr(self.layer) if self.layer else "", self.location) if part)
        head = f"{self.code} {self.severity.value}" + (f" {where}" if where else "")
        body = [self.what, f"Why: {self.why}", f"Mend: {self.remedy}"]
        return "\n".join(
            [head, *(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="  ") for line in body)]
        )


class Findings(Sequence[Finding]):
    """Findings in order of severity: a list, a table in Jupyter, text in a terminal.

    >>> found = Findings([Finding("QL109", Severity.HINT, None, "", "a batch of 1", "no mean", "use more")])
    >>> len(found), found.ok, [f.code for f in found.of("hint")]
    (1, True, ['QL109'])
    """

    def __init__(self, findings: Iterable[Finding] = ()) -> None:
        order = list(Severity)
        self._findings = sorted(findings, key=lambda f: order.index(f.severity))

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> "Findings": ...
    def __getitem__(self, index: int | slice) -> "Finding | Findings":
        found = self._findings[index]
        return Findings(found) if isinstance(found, list) else found

    def __len__(self) -> int:
        return len(self._findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of quantization: there is no error."""
        return not any(finding.severity is Severity.ERROR for finding in self)

    def of(self, severity: Severity | str) -> "Findings":
        """Those of one severity: 'error', 'warning' or 'hint'."""
        wanted = Severity(severity)
        return Findings(finding for finding in self if finding.severity is wanted)

    def where(self, code: str | None = None, layer: str | None = None) -> "Findings":
        """Those with a code, on a layer, or both."""
        return Findings(f for f in self if code in (None, f.code) and layer in (None, f.layer))

    def to_pandas(self) -> "pd.DataFrame":
        """One row a finding."""
        import pandas as pd

        rows = [{name: getattr(finding, name) for name in _COLUMNS} for finding in self]
        frame = pd.DataFrame(rows, columns=_COLUMNS)
        frame["severity"] = [finding.severity.value for finding in self]
        return frame

    def __repr__(self) -> str:
        return "\n".join([self._summary(), *map(str, self)])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        rows = []
        for finding in self:
            values = {name: getattr(finding, name) or "" for name in _COLUMNS} | {"severity": finding.severity.value}
            cells = "".join(f'<td style="text-align:left">{html.escape(str(v))}</td>' for v in values.values())
            rows.append(f"<tr>{cells}</tr>")
        caption = f"<caption>{html.escape(self._summary())}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"

    def _summary(self) -> str:
        counts = {severity: len(self.of(severity)) for severity in Severity}
        told = [f"{n} {s.value}{'s' if n > 1 else ''}" for s, n in counts.items() if n]
        return "Findings: " + (", ".join(told) if told else "none; the model is ready to be quantized")


_COLUMNS = ["code", "severity", "layer", "location", "what", "why", "remedy"]

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Note:
    """What one rule noticed at one place; `remedy` and `severity` where they differ from the rule's."""

    what: str
    layer: str | None = None
    location: str = ""
    remedy: str = ""
    severity: Severity | None = None


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One thing to look for: a stable code, a title as in docs/validator.md, and the function that looks."""

    code: str
    title: str
    severity: Severity
    why: str
    remedy: str
    look: Callable[[Subject], Iterable[Note]]

    def apply(self, subject: Subject) -> list[Finding]:
        """What the rule finds in `subject`."""
        return [self.finding(note) for note in self.look(subject)]

    def finding(self, note: Note) -> Finding:
        """The note as a finding, with what the rule says of all of them."""
        severity, remedy = note.severity or self.severity, note.remedy or self.remedy
        return Finding(self.code, severity, note.layer, note.location, note.what, self.why, remedy)


class Rules(list[Rule[Any]]):
    """Rules in the order in which they are applied."""

    def rule(self, code: str, severity: Severity, title: str, why: str, remedy: str) -> Callable[..., Any]:
        """A decorator that adds a function from a subject to Notes as a rule."""

        def add(look: Callable[[Any], Iterable[Note]]) -> Callable[[Any], Iterable[Note]]:
            self.append(Rule(code, title, severity, why, remedy, look))
            return look

        return add

    def apply(self, subject: Any) -> list[Finding]:
        """What all rules find in `subject`."""
        return [finding for rule in self for finding in rule.apply(subject)]
