"""Bit widths to try: the same for weights and outputs, apart, or as the sim is set."""

import re
from dataclasses import dataclass
from typing import Any

from qlab.errors import SpecError
from qlab.quantization import QuantSpec


@dataclass(frozen=True)
class Bits:
    """Bits of weights and of outputs; None leaves what the sim asks for.

    >>> [str(Bits.of(value)) for value in (None, 4, (4, 8), "w4a16")]
    ['as set', '4', 'W4A8', 'W4A16']
    """

    weight: int | None = None
    output: int | None = None

    @classmethod
    def of(cls, value: Any) -> "Bits":
        """The widths named by None, a number, a pair (weight, output) or a word such as 'W4A8'."""
        if isinstance(value, cls):
            return value
        match = re.fullmatch(r"[wW](\d+)[aA](\d+)", value) if isinstance(value, str) else None
        if match:
            value = (int(match[1]), int(match[2]))
        elif value == "as set":
            value = None
        elif isinstance(value, str) and value.isdigit():
            value = int(value)
        pair = value if isinstance(value, (tuple, list)) else (value, value)
        if len(pair) != 2 or isinstance(value, str):
            raise SpecError(f"bits must be a number, a pair (weight, output) or a word such as 'W4A8'; got {value!r}.")
        for bits in pair:
            if bits is not None:
                QuantSpec(bits=bits)  # raises SpecError with what is allowed
        return cls(*pair)

    @classmethod
    def several(cls, value: Any) -> "tuple[Bits, ...]":
        """The widths of a list (numbers in it are widths of their own) or of words with commas between; or of one.

        >>> [str(bits) for bits in Bits.several("4, W4A8")]
        ['4', 'W4A8']
        """
        value = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        values = value if isinstance(value, (list, tuple, range)) else [value]
        return tuple(dict.fromkeys(cls.of(item) for item in values))

    def __str__(self) -> str:
        if self.weight is None and self.output is None:
            return "as set"
        if self.weight == self.output:
            return str(self.weight)
        weight, output = ("" if bits is None else str(bits) for bits in (self.weight, self.output))
        return f"W{weight}A{output}"
