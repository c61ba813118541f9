"""Grids as files write them: which integer type holds a grid, and where each convention puts its zero.

qlab counts from [qmin, qmax] with a zero point inside it (`Encoding`). ONNX has integer types of 4, 8 and 16 bits and
calls the same number y_zero_point. AIMET counts every grid from 0: its offset is minus the zero point of that grid, so
symmetric int8 shows -128. All conversions between the three are here.
"""

from dataclasses import dataclass

from torch import Tensor

from qlab.errors import InputError
from qlab.quantization import Encoding

WIDTHS = (4, 8, 16)


@dataclass(frozen=True)
class IntegerType:
    """An integer type that files and runtimes know: 4, 8, 16 or 32 bits, signed or not."""

    bits: int
    signed: bool

    @classmethod
    def holding(cls, encoding: Encoding) -> "IntegerType":
        """The narrowest type of 4, 8 or 16 bits that holds the grid.

        >>> import torch
        >>> IntegerType.holding(Encoding(torch.tensor(1.0), torch.tensor(0.0), -32, 31)).name
        'int8'
        """
        signed = encoding.qmin < 0
        for bits in WIDTHS:
            found = cls(bits, signed)
            if found.limits[0] <= encoding.qmin and encoding.qmax <= found.limits[1]:
                return found
        raise InputError(f"no integer type of 4, 8 or 16 bits holds the grid [{encoding.qmin}, {encoding.qmax}].")

    @property
    def name(self) -> str:
        """As ONNX and numpy call it: 'int8', 'uint4'."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer.

        >>> IntegerType(4, True).limits, IntegerType(8, False).limits
        ((-8, 7), (0, 255))
        """
        if self.signed:
            return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        return 0, (1 << self.bits) - 1

    def is_filled_by(self, encoding: Encoding) -> bool:
        """Whether saturating to the type is the same as clamping to the grid."""
        return self.limits == (encoding.qmin, encoding.qmax)


def offset_of(encoding: Encoding) -> Tensor:
    """AIMET's offset, shaped as the scale: minus the zero point counted from the smallest integer of the grid.

    >>> import torch
    >>> int(offset_of(Encoding(torch.tensor(1.0), torch.tensor(0.0), -128, 127)))
    -128
    >>> int(offset_of(Encoding(torch.tensor(1.0), torch.tensor(3.0), 0, 255)))
    -3
    """
    return encoding.qmin - encoding.zero_point


def limits_of_offset(bits: int, symmetric: bool, offset: int) -> tuple[int, int]:
    """(qmin, qmax) of a grid that AIMET writes with this offset.

    A symmetric grid has its zero at 0, so its offset is qmin itself: -128 symmetric, -127 strict, 0 unsigned.

    >>> limits_of_offset(8, True, -128), limits_of_offset(8, True, -127), limits_of_offset(8, True, 0)
    ((-128, 127), (-127, 127), (0, 255))
    >>> limits_of_offset(8, False, -135)
    (0, 255)
    """
    if not symmetric or offset == 0:
        return 0, (1 << bits) - 1
    half = 1 << (bits - 1)
    if offset not in (-half, -(half - 1)):
        raise InputError(
            f"a symmetric grid of {bits} bits has offset {-half}, {-(half - 1)} (strict) or 0 (unsigned); got {offset}."
        )
    return offset, half - 1


def shifted_to_unsigned(zero_point: Tensor, stored: IntegerType) -> Tensor:
    """The zero point counted from 0 of one that is counted from the smallest integer of `stored`.

    >>> import torch
    >>> shifted_to_unsigned(torch.tensor(-3.0), IntegerType(8, True)).item()
    125.0
    """
    return zero_point - stored.limits[0]


def tensor_shaped(values: Tensor, encoding: Encoding, rank: int) -> Tensor:
    """Scales or zero points of blocks, [C, blocks], with the rank and order of axes of the tensor they belong to."""
    assert encoding.axis is not None
    shape = [1] * rank
    shape[encoding.axis], shape[encoding.block_axis] = values.shape
    ordered = values if encoding.axis < encoding.block_axis else values.t()
    return ordered.reshape(shape)
