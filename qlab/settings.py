"""Settings as declarations: one dataclass field says default, range, unit and help.

Validation, forms and documentation come from that one line; see `setting` and `describe`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlab.errors import QlabError


class SettingError(QlabError, ValueError):
    """A setting has a value outside its declaration."""


@dataclass(frozen=True)
class Declaration:
    """What a form needs to know of one setting.

    kind: 'bool', 'int', 'float', 'choice', 'text' (also globs, comma separated, when several), or 'hidden' for values
    that only code can give.
    """

    name: str
    kind: str
    default: Any
    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] = (),
    unit: str = "",
    hidden: bool = False,
) -> Any:
    """A dataclass field with its declaration. A default of None, or None among the choices, makes it optional."""
    declaration = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": tuple(choices),
        "unit": unit,
        "hidden": hidden,
    }
    return dataclasses.field(default=default, metadata={"qlab": declaration})


def describe(owner: Any) -> list[Declaration]:
    """The declared settings of a dataclass (or of an instance, with its values as defaults), in order.

    >>> @dataclass(frozen=True)
    ... class Blur:
    ...     radius: int = setting(2, "pixels on each side", minimum=1, unit="px")
    >>> describe(Blur)[0].kind, describe(Blur(radius=5))[0].default
    ('int', 5)
    """
    found = []
    for field in dataclasses.fields(owner):
        told = field.metadata.get("qlab")
        if told is None:
            continue
        value = field.default if isinstance(owner, type) else getattr(owner, field.name)
        found.append(
            Declaration(
                field.name,
                _kind(field.default, str(field.type), told),
                value,
                told["help"],
                told["unit"],
                told["minimum"],
                told["maximum"],
                told["choices"],
                field.default is None or None in told["choices"],
            )
        )
    return found


def check(owner: Any) -> None:
    """Raises SettingError, with what is allowed, for the first setting of `owner` outside its declaration."""
    for declared in describe(owner):
        value, name = getattr(owner, declared.name), f"{type(owner).__name__}({declared.name}=...)"
        if value is None and declared.optional:
            continue
        if declared.choices and value not in declared.choices:
            raise SettingError(f"{name} must be one of {list(declared.choices)}; got {value!r}.")
        if declared.kind == "bool" and not isinstance(value, bool):
            raise SettingError(f"{name} must be True or False; got {value!r}.")
        if declared.kind in ("int", "float") and not declared.choices:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or (declared.kind == "int" and value != int(value)):
                wanted = "a whole number" if declared.kind == "int" else "a number"
                raise SettingError(f"{name} must be {wanted}; got {value!r}.")
            low, high = declared.minimum, declared.maximum
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
                unit = f" {declared.unit}" if declared.unit else ""
                raise SettingError(f"{name} must be {bounds}{unit}; got {value!r}.")


def _kind(default: Any, annotation: str, told: dict[str, Any]) -> str:
    if told["hidden"]:
        return "hidden"
    if told["choices"]:
        return "choice"
    if isinstance(default, bool):
        return "bool"
    if isinstance(default, int) or (default is None and annotation.startswith("int")):
        return "int"
    if isinstance(default, float) or (default is None and annotation.startswith("float")):
        return "float"
    return "text"
