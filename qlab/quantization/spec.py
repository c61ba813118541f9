"""What is asked of one tensor: bits, scheme, granularity and range rule, as frozen values.

A `QuantSpec` says nothing of the data; together with statistics a range rule turns it into an `Encoding`.
"""

import enum
import re
from dataclasses import dataclass

from qlab.errors import SpecError


class Scheme(enum.Enum):
    """How the integer grid lies around zero (b bits; ALGORITHMS: Jacob et al. 2018, arXiv:1712.05877)."""

    ASYMMETRIC = "asymmetric"  # [0, 2^b - 1] with a zero point
    SYMMETRIC = "symmetric"  # [-2^(b-1), 2^(b-1) - 1], zero point 0
    STRICT_SYMMETRIC = "strict_symmetric"  # [-(2^(b-1) - 1), 2^(b-1) - 1], zero point 0
    UNSIGNED_SYMMETRIC = "unsigned_symmetric"  # [0, 2^b - 1], zero point 0, where no value is negative; else symmetric

    @classmethod
    def of(cls, value: "Scheme | str") -> "Scheme":
        """The scheme named by `value`; raises SpecError with the known names."""
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(repr(s.value) for s in cls)
            raise SpecError(f"scheme must be one of {known}; got {value!r}.") from None


@dataclass(frozen=True)
class Granularity:
    """How many grids one tensor has: one, one a channel, or one a block of input channels.

    >>> Granularity.of("per_block(32)")
    per_block(32)
    """

    kind: str
    block_size: int | None = None

    @classmethod
    def of(cls, value: "Granularity | str") -> "Granularity":
        """The granularity named by 'per_tensor', 'per_channel' or 'per_block(n)'."""
        if isinstance(value, Granularity):
            return value
        if value in ("per_tensor", "per_channel"):
            return cls(value)
        match = re.fullmatch(r"per_block\((\d+)\)", str(value))
        if match and int(match[1]) > 0:
            return cls("per_block", int(match[1]))
        raise SpecError(f"granularity must be 'per_tensor', 'per_channel' or 'per_block(n)', n > 0; got {value!r}.")

    def __str__(self) -> str:
        return self.kind if self.block_size is None else f"{self.kind}({self.block_size})"

    __repr__ = __str__


PER_TENSOR = Granularity("per_tensor")
PER_CHANNEL = Granularity("per_channel")


def per_block(size: int) -> Granularity:
    """One grid for each output channel and block of `size` input channels; the last block may be shorter."""
    return Granularity.of(f"per_block({size})")


_RULE_DEFAULTS: dict[str, float | None] = {
    "min_max": None,
    "percentile": 99.99,
    "mse": None,
    "sqnr": None,
    "entropy": None,
}


@dataclass(frozen=True)
class RangeRule:
    """How a range is chosen from statistics; 'percentile' takes its percentage as a parameter.

    >>> RangeRule.of("percentile(99.9)")
    percentile(99.9)
    """

    name: str
    parameter: float | None = None

    @classmethod
    def of(cls, value: "RangeRule | str") -> "RangeRule":
        """The rule named by 'min_max', 'percentile', 'percentile(p)', 'mse', 'sqnr' or 'entropy'."""
        if isinstance(value, RangeRule):
            return value
        match = re.fullmatch(r"([a-z_]+)(?:\(([0-9.]+)\))?", str(value))
        if match and match[1] in _RULE_DEFAULTS and (match[2] is None or match[1] == "percentile"):
            parameter = float(match[2]) if match[2] else _RULE_DEFAULTS[match[1]]
            if parameter is None or 50 < parameter <= 100:
                return cls(match[1], parameter)
        known = ", ".join(repr(name) for name in _RULE_DEFAULTS)
        raise SpecError(f"rule must be one of {known} or 'percentile(p)' with 50 < p <= 100; got {value!r}.")

    def __str__(self) -> str:
        plain = self.parameter is None or self.parameter == _RULE_DEFAULTS[self.name]
        return self.name if plain else f"{self.name}({self.parameter:g})"

    __repr__ = __str__


RULE_NAMES = tuple(_RULE_DEFAULTS)
SCHEME_NAMES = tuple(scheme.value for scheme in Scheme)


@dataclass(frozen=True)
class QuantSpec:
    """What is asked of one tensor. Strings are taken for every field and become values.

    bits: 2 to 16, or 32 for biases. known_range: the range is given, not measured (softmax: 0 to 1).
    Edit with `dataclasses.replace`.

    >>> QuantSpec(bits=4, scheme="symmetric", granularity="per_channel")
    int4 symmetric per_channel min_max
    """

    bits: int = 8
    scheme: Scheme = Scheme.ASYMMETRIC
    granularity: Granularity = PER_TENSOR
    rule: RangeRule = RangeRule("min_max")
    known_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits != int(self.bits) or not (2 <= self.bits <= 16 or self.bits == 32):
            raise SpecError(f"bits must be a whole number from 2 to 16 (or 32 for a bias); got {self.bits!r}.")
        object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "scheme", Scheme.of(self.scheme))
        object.__setattr__(self, "granularity", Granularity.of(self.granularity))
        object.__setattr__(self, "rule", RangeRule.of(self.rule))
        if self.known_range is not None:
            low, high = map(float, self.known_range)
            if not low < high:
                raise SpecError(f"known_range must be (low, high) with low < high; got {self.known_range!r}.")
            object.__setattr__(self, "known_range", (low, high))

    def limits(self, nonnegative: bool = False) -> tuple[int, int]:
        """(qmin, qmax) of the integer grid; `nonnegative` matters for the unsigned symmetric scheme only.

        >>> QuantSpec(8, "symmetric").limits(), QuantSpec(4).limits()
        ((-128, 127), (0, 15))
        """
        steps = 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        if self.scheme is Scheme.ASYMMETRIC or (self.scheme is Scheme.UNSIGNED_SYMMETRIC and nonnegative):
            return 0, steps
        if self.scheme is Scheme.STRICT_SYMMETRIC:
            return -(half - 1), half - 1
        return -half, half - 1

    def __str__(self) -> str:
        return f"int{self.bits} {self.scheme.value} {self.granularity} {self.rule}"

    __repr__ = __str__
