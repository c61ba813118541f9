"""How everything here is measured: seconds of works in turns, their ratio with its spread, and peaks of memory.

Works that are compared run one after the other in every repeat, so that a disturbance meets all of them. With one
thread the time is that of the processor, which other programs disturb little; with more it is that of the wall.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

Row = dict[str, float]
"""ratio (or seconds, or bytes: the row's name says), low and high: the lower and the upper quartile."""

RESET = Path("/proc/self/clear_refs")


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call: of the processor where one thread computes, else of the wall."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def interleaved(repeats: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of each work, one after the other in every repeat, after one call of each that does not count."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            found.append(seconds(work))
    return times


def ratio(part: list[float], whole: list[float]) -> Row:
    """The ratio of the medians, and the quartiles of the ratios of each repeat.

    >>> ratio([2.0, 2.0, 6.0], [1.0, 2.0, 2.0])
    {'ratio': 1.0, 'low': 1.0, 'high': 3.0}
    """
    return {"ratio": statistics.median(part) / statistics.median(whole), **_quartiles(_each(part, whole))}


def middle(values: list[float]) -> Row:
    """The median of some measurements, with the quartiles.

    >>> middle([3.0, 1.0, 2.0])
    {'ratio': 2.0, 'low': 1.0, 'high': 3.0}
    """
    return {"ratio": statistics.median(values), **_quartiles(values)}


def exactly(value: float) -> Row:
    """A row of one measurement."""
    return {"ratio": value, "low": value, "high": value}


def peak_bytes(work: Callable[[], object]) -> int:
    """How much the memory of the process rises above its start while `work` is done. On Linux only.

    To be run with MALLOC_MMAP_THRESHOLD_=65536, so that what is freed is given back.
    """

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    RESET.write_text("5")
    began = field("VmRSS")
    work()
    return max(field("VmHWM") - began, 0)


def _each(part: list[float], whole: list[float]) -> list[float]:
    return [a / b for a, b in zip(part, whole, strict=True)]


def _quartiles(values: list[float]) -> Row:
    if len(values) < 2:
        return {"low": values[0], "high": values[0]}
    low, _, high = statistics.quantiles(values, n=4)
    return {"low": low, "high": high}


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of Adam in train mode, on made-up labels for the batch `x`."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    labels = torch.arange(len(x)) % 10

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x).reshape(len(x), -1), labels).backward()
        optimizer.step()

    return work
