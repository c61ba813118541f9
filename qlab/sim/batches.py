"""Batches as users have them: loaders, lists, generators of tensors, tuples, dicts, with or without labels."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.errors import InputError
from qlab.graph import LayerGraph


class Batches:
    """Any iterable of batches, readable more than once: a generator is kept as it is read.

    A single tensor or dict counts as one batch.
    """

    def __init__(self, batches: Any) -> None:
        if isinstance(batches, Batches):
            self._source: Any = batches._source
            return
        if isinstance(batches, (Tensor, Mapping)):
            batches = [batches]
        if not isinstance(batches, Iterable):
            raise InputError(
                f"expected an iterable of batches (tensors, tuples or dicts); got {type(batches).__name__}. "
                "A DataLoader, a list of tensors or a single tensor will do."
            )
        self._source = list(batches) if isinstance(batches, Iterator) else batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._source)

    @property
    def source(self) -> Any:
        """What was given: the loader, the list; for a generator the list of what it yielded."""
        return self._source

    def __len__(self) -> int:
        """The number of batches; 0 where the iterable does not know."""
        try:
            return len(self._source)
        except TypeError:
            return 0


def flat_inputs(graph: LayerGraph, batch: Any, device: torch.device | None = None) -> list[Any]:
    """The model's flat inputs of one batch: of (x, y) the x, of a dict the entries that the model takes."""
    args, kwargs = _split(graph, batch)
    flat = graph.bind(args, kwargs)
    return [v.to(device) if isinstance(v, Tensor) and device is not None else v for v in flat]


def labels_of(graph: LayerGraph, batch: Any) -> Tensor:
    """The labels of one batch: the last entry of a tuple beyond the inputs, or 'labels' of a dict."""
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "y", "target"):
            if isinstance(batch.get(key), Tensor):
                return batch[key]
    elif isinstance(batch, (list, tuple)) and len(batch) > _taken(graph) and isinstance(batch[-1], Tensor):
        return batch[-1]
    raise InputError(
        "expected labelled batches, (x, y) or a dict with 'labels'; got "
        f"{type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, (list, tuple, dict)) else ''}. "
        "Agreement(batches) and SQNR(batches) need no labels."
    )


def _taken(graph: LayerGraph) -> int:
    return graph.positional + len(graph.keywords)


def _split(graph: LayerGraph, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        names = [*graph.signature[: graph.positional], *graph.keywords]
        if all(name in batch for name in names):
            return (), {name: batch[name] for name in names}
        if graph.positional == 1 and not graph.keywords:
            return (dict(batch),), {}
        missing = [name for name in names if name not in batch]
        raise InputError(f"a batch lacks the inputs {missing}; it has {sorted(batch)}.")
    if isinstance(batch, (list, tuple)):
        return tuple(batch[: _taken(graph)]), {}
    return (batch,), {}
