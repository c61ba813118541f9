"""What a person may type into a cell of the layer grid; checked in Python before anything changes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

Scalar = int | float | str | bool | None


class EditRefused(ValueError):
    """Why an edit cannot be made, as the sentence that the person reads."""


class CellEditor(Protocol):
    """Turns what arrived from the browser into the cell's value."""

    kind: ClassVar[str]

    def accept(self, typed: object, allowed: Sequence[Scalar] | None = None) -> Scalar:
        """Return the value; raises EditRefused with "takes ..., got ...". `allowed` narrows it for one cell."""
        ...


@dataclass(frozen=True)
class Choice:
    """One of a list, by a menu or by typing its digits.

    >>> Choice((2, 4, 8)).accept("4")
    4
    >>> Choice((2, 4, 8)).accept("7")
    Traceback (most recent call last):
    qlab.views.cell_editors.EditRefused: takes 2, 4 or 8; got '7'
    """

    values: tuple[Scalar, ...]
    kind: ClassVar[str] = "choice"

    def accept(self, typed: object, allowed: Sequence[Scalar] | None = None) -> Scalar:
        values = self.values if allowed is None else allowed
        for value in values:
            if str(value) == str(typed):
                return value
        raise EditRefused(f"takes {_listed(values)}; got {str(typed)!r}")


@dataclass(frozen=True)
class Flag:
    """On or off."""

    kind: ClassVar[str] = "flag"

    def accept(self, typed: object, allowed: Sequence[Scalar] | None = None) -> bool:
        if isinstance(typed, bool):
            return typed
        raise EditRefused(f"is on or off; got {typed!r}")


@dataclass(frozen=True)
class Number:
    """A number in a range; empty means None where that is allowed.

    >>> Number(0, 100).accept("99.9")
    99.9
    >>> Number(1, whole=True).accept("0")
    Traceback (most recent call last):
    qlab.views.cell_editors.EditRefused: takes a whole number of at least 1; got '0'
    """

    minimum: float | None = None
    maximum: float | None = None
    whole: bool = False
    optional: bool = False
    kind: ClassVar[str] = "number"

    def accept(self, typed: object, allowed: Sequence[Scalar] | None = None) -> int | float | None:
        text = str(typed).strip()
        if not text and self.optional:
            return None
        try:
            number = int(text) if self.whole else float(text)
        except ValueError:
            number = math.nan
        too_small = self.minimum is not None and number < self.minimum
        too_large = self.maximum is not None and number > self.maximum
        if not math.isfinite(number) or too_small or too_large:
            raise EditRefused(f"takes {self._expected()}; got {text!r}")
        return number

    def _expected(self) -> str:
        noun = "a whole number" if self.whole else "a number"
        if self.minimum is not None and self.maximum is not None:
            noun += f" from {self.minimum:g} to {self.maximum:g}"
        elif self.minimum is not None:
            noun += f" of at least {self.minimum:g}"
        elif self.maximum is not None:
            noun += f" of at most {self.maximum:g}"
        return noun + (" or nothing" if self.optional else "")


@dataclass(frozen=True)
class Text:
    """One line of text."""

    max_length: int = 200
    kind: ClassVar[str] = "text"

    def accept(self, typed: object, allowed: Sequence[Scalar] | None = None) -> str:
        text = " ".join(str(typed).split())
        if len(text) > self.max_length:
            raise EditRefused(f"takes at most {self.max_length} characters; got {len(text)}")
        return text


def describe(editor: CellEditor | None) -> dict[str, Any] | None:
    """What the browser must know of an editor."""
    return None if editor is None else {"kind": editor.kind, **asdict(editor)}  # type: ignore[call-overload]


def _listed(values: Sequence[Scalar]) -> str:
    *most, last = [str(value) for value in values]
    return f"{', '.join(most)} or {last}" if most else last
