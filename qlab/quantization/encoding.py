"""The grid that was found for one tensor: scale, zero point and integer limits, with shapes that broadcast."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qlab.errors import SpecError


@dataclass(frozen=True, eq=False)
class Encoding:
    """A real number x is stored as the integer q = clamp(round(x / scale) + zero_point, qmin, qmax).

    Shapes, for a tensor of shape [.., C, ..] with C at `axis`:
      per tensor   scale [],          axis None
      per channel  scale [C],         axis given
      per block    scale [C, blocks], axis given, `block_size` entries of `block_axis` share a scale
    `zero_point` has the shape of `scale` and holds whole numbers as floats; it lies in [qmin, qmax].
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    axis: int | None = None
    block_size: int | None = None
    block_axis: int = 1

    @property
    def bits(self) -> int:
        """The bits of the integer grid."""
        return max((self.qmax - self.qmin).bit_length(), 1)

    @property
    def minimum(self) -> Tensor:
        """The smallest value on the grid, shaped as `scale`."""
        return (self.qmin - self.zero_point) * self.scale

    @property
    def maximum(self) -> Tensor:
        """The largest value on the grid, shaped as `scale`."""
        return (self.qmax - self.zero_point) * self.scale

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is 0 on a signed grid."""
        return self.qmin < 0 and not bool(self.zero_point.any())

    @cached_property
    def scalars(self) -> tuple[float, float, float] | None:
        """(scale, qmin - zero_point, qmax - zero_point) as numbers where there is one grid, else None."""
        if self.scale.dim() != 0:
            return None
        zero_point = self.zero_point.item()
        return self.scale.item(), self.qmin - zero_point, self.qmax - zero_point

    def broadcast(self, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Scale and zero point shaped so that they broadcast against a tensor of `shape`."""
        if self.axis is None:
            return self.scale, self.zero_point
        axis = self.axis % len(shape)
        if self.scale.shape[0] != shape[axis]:
            raise SpecError(
                f"an encoding of {self.scale.shape[0]} channels on axis {self.axis} does not fit a tensor of shape "
                f"{tuple(shape)}. Calibrate again, or set the granularity to 'per_tensor'."
            )
        if self.block_size is None:
            view = [1] * len(shape)
            view[axis] = -1
            return self.scale.view(view), self.zero_point.view(view)
        view = [1] * len(shape)
        view[axis], view[self.block_axis] = shape[axis], shape[self.block_axis]
        order = slice(None) if axis < self.block_axis else None

        def spread(values: Tensor) -> Tensor:
            wide = values.repeat_interleave(self.block_size, dim=1)[:, : shape[self.block_axis]]
            return (wide if order is not None else wide.t()).reshape(view)

        return spread(self.scale), spread(self.zero_point)

    def over(self, shape: torch.Size | tuple[int, ...]) -> "Encoding":
        """The same grid with scale and zero point as `broadcast` shapes them, without axis and blocks."""
        return self if self.axis is None else Encoding(*self.broadcast(shape), self.qmin, self.qmax)

    def to(self, device: torch.device | str) -> "Encoding":
        """The same encoding with its tensors on `device`."""
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device))

    def copy(self) -> "Encoding":
        """The same encoding with tensors of its own, without gradient."""
        return replace(self, scale=self.scale.detach().clone(), zero_point=self.zero_point.detach().clone())

    def equals(self, other: "Encoding | None") -> bool:
        """Whether both describe the same grid, bit for bit."""
        return (
            other is not None
            and (self.qmin, self.qmax, self.axis, self.block_size, self.block_axis)
            == (other.qmin, other.qmax, other.axis, other.block_size, other.block_axis)
            and self.scale.shape == other.scale.shape
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )

    def __repr__(self) -> str:
        grid = f"[{self.qmin}, {self.qmax}]"
        if self.scale.dim() == 0:
            return f"Encoding(scale={float(self.scale):.4g}, zero_point={int(self.zero_point)}, grid={grid})"
        low, high = float(self.scale.min()), float(self.scale.max())
        return f"Encoding(scale={low:.4g}..{high:.4g} x{tuple(self.scale.shape)}, axis={self.axis}, grid={grid})"
