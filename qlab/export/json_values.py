"""Values out of a JSON file that nobody vouches for: each is checked, or refused with a sentence that names it."""

from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError


def expect(kind: type, value: Any, what: str) -> Any:
    """`value` if it is of that kind."""
    if not isinstance(value, kind):
        words: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
        raise InputError(f"{what} must be {words[kind]}; got {'nothing' if value is None else type(value).__name__}.")
    return value


def bits_of(value: Any, name: str) -> int:
    """A number of bits, 2 to 16 or 32."""
    if isinstance(value, bool) or not isinstance(value, int) or not (2 <= value <= 16 or value == 32):
        raise InputError(f"{name!r} has {value!r} bits; expected a whole number from 2 to 16, or 32 for a bias.")
    return value


def size_of(value: Any, name: str) -> int:
    """A positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise InputError(f"{name!r} has block_size {value!r}; expected a positive whole number.")
    return value


def truth(value: Any, what: str) -> bool:
    """A truth value, written as one or as a word."""
    if isinstance(value, bool):
        return value
    if value in ("True", "False", "true", "false"):
        return str(value).lower() == "true"
    raise InputError(f"{what} must be true or false; got {value!r}.")


def numbers(values: list[Any], what: str) -> Tensor:
    """Finite numbers as a float32 tensor [n]."""
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise InputError(f"{what} must be numbers.")
    try:
        found = torch.tensor(values, dtype=torch.float64)
    except (OverflowError, RuntimeError, ValueError):
        raise InputError(f"{what} has a number that is too large.") from None
    if not bool(torch.isfinite(found.float()).all()):
        raise InputError(f"{what} has a number that is not finite.")
    return found.float()


def whole(values: list[Any], what: str) -> Tensor:
    """Whole numbers as a float32 tensor [n]."""
    found = numbers(values, what)
    if bool((found != found.round()).any()) or bool((found.abs() > 1 << 32).any()):
        raise InputError(f"{what} must be whole numbers.")
    return found


def nested(value: Any, what: str) -> Tensor:
    """A number or nested lists of numbers of equal lengths, at most eight deep, as a tensor."""
    flat: list[Any] = []

    def shape_of(part: Any, depth: int) -> tuple[int, ...]:
        if not isinstance(part, list):
            flat.append(part)
            return ()
        if depth == 8 or not part:
            raise InputError(f"{what} is {'nested too deeply' if part else 'an empty list'}.")
        shapes = {shape_of(item, depth + 1) for item in part}
        if len(shapes) != 1:
            raise InputError(f"{what} has lists of different lengths.")
        return (len(part), *shapes.pop())

    shape = shape_of(value, 0)
    return numbers(flat, what).reshape(shape)


def positive(scale: Tensor, name: str) -> Tensor:
    """`scale` if every number is above 0."""
    if not bool((scale > 0).all()):
        raise InputError(f"{name!r} has a scale that is not above 0.")
    return scale
