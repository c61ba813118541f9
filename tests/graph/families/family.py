"""One model family: how to build a small member of it, and what a batch for it looks like."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A family by name; `build` gives a model with random weights, `batch(n)` n samples as the model takes them."""

    name: str
    group: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]

    def __str__(self) -> str:
        return self.name


def images(*shape: int) -> Callable[[int], Tensor]:
    """Batches of noise of that shape."""
    return lambda n: torch.randn(n, *shape)


def tokens(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    """Batches of token numbers."""
    return lambda n: torch.randint(0, vocabulary, (n, length))
