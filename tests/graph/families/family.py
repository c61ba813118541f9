"""One model family: how to build a small member of it, what a batch for it looks like, and what qlab makes of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qlab
from qlab.graph.admission import readable, without_fused_attention
from qlab.graph.example import example_arguments


@dataclass(frozen=True)
class Family:
    """A family by name; `build` gives a model with random weights, `batch(n)` n samples as the model takes them."""

    name: str
    group: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


def images(*shape: int) -> Callable[[int], Tensor]:
    """Batches of noise of that shape."""
    return lambda n: torch.randn(n, *shape)


def tokens(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    """Batches of token numbers."""
    return lambda n: torch.randint(0, vocabulary, (n, length))


@dataclass(frozen=True)
class Outcome:
    """What became of one family.

    layers: steps of the captured model, in_float: those of them that stay in float. seconds: to capture and place it.
    exact: whether the captured model equals the user's bit for bit on a batch of another size. unexplained: float steps
    without a reason. finite, sqnr (dB): of the calibrated sim at 8-bit weights and 16-bit activations.
    """

    layers: int
    in_float: int
    seconds: float
    exact: bool
    unexplained: tuple[str, ...]
    finite: bool
    sqnr: float


@torch.no_grad()
def examine(family: Family) -> Outcome:
    """Capture with 2 samples, compare on 5, calibrate on 8, and score on 4 of those."""
    torch.manual_seed(0)
    model, example = family.build().eval(), family.batch(2)
    start = time.perf_counter()
    sim = qlab.QuantSim(model, example, qlab.presets.w8a16(per_channel=True))
    seconds = time.perf_counter() - start
    batch = family.batch(5)
    args, kwargs = example_arguments(model, batch)
    with without_fused_attention():
        want = readable(model(*args, **kwargs))
    exact = same(want, sim.float_output(batch))
    coverage = sim.coverage()
    in_float = coverage[coverage["role"] == "float"]
    unexplained = in_float[in_float["reason"] == ""]["layer"]
    scored = family.batch(4)
    sim.calibrate([family.batch(4), scored])
    output = sim.output(scored)
    values = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
    finite = all(bool(v.isfinite().all()) for v in values)
    score = sim.evaluate(qlab.SQNR([scored]))
    return Outcome(len(coverage), len(in_float), seconds, exact, tuple(unexplained), finite, float(score))


def same(a: Any, b: Any) -> bool:
    """Whether two results have one structure and equal leaves, tensors bit for bit."""
    (left, left_spec), (right, right_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return left_spec == right_spec and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(left, right, strict=True)
    )


def settled(model: nn.Module, batch: Any) -> nn.Module:
    """Changes `model`: BatchNorms get factor 1 and the statistics of one pass, so that values do not vanish."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.ones_(module.weight)
    args, kwargs = example_arguments(model, batch)
    with torch.no_grad():
        model(*args, **kwargs)
    return model.eval()
