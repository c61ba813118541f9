"""Positions for the layers of a graph from its edges: depth along the reading direction, branches side by side.

Time is linear in layers and edges (but for sorting the few layers of equal depth). A deep network is folded like a
snake into several bands, so that hundreds of layers fill a page instead of a line.
"""

from collections.abc import Iterable, Sequence

import pandas as pd


def layered_layout(layers: Sequence[str], edges: Iterable[tuple[str, str]], *, fold: int | None = None) -> pd.DataFrame:
    """Return `layer`, `x`, `y`, `depth` for each layer; edges are (from, to) and must not form a cycle.

    Depth is the longest path from an input. `fold` is how many depths a band holds: even bands run to the right, odd
    ones back to the left, each below the last; None keeps one band.

    >>> layered_layout(["a", "b", "c"], [("a", "b"), ("b", "c")])[["x", "y"]].values.tolist()
    [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]

    Raises ValueError naming an unknown layer or the layers of a cycle.
    """
    parents: dict[str, list[str]] = {layer: [] for layer in layers}
    children: dict[str, list[str]] = {layer: [] for layer in layers}
    for source, target in edges:
        for end in (source, target):
            if end not in parents:
                raise ValueError(f"edge ('{source}', '{target}') names '{end}', which is not among the layers.")
        children[source].append(target)
        parents[target].append(source)
    depth = _depths(parents, children)
    lane = _lanes(parents, depth)
    fold = fold or max(depth.values(), default=0) + 1
    band_lows: dict[int, float] = {}
    band_highs: dict[int, float] = {}
    for layer, level in depth.items():
        band = level // fold
        band_lows[band] = min(band_lows.get(band, 0.0), lane[layer])
        band_highs[band] = max(band_highs.get(band, 0.0), lane[layer])
    shift, offset = {}, 0.0
    for band in sorted(band_lows):
        shift[band] = offset - band_highs[band]
        offset += band_lows[band] - band_highs[band] - 2.0
    first = shift.get(0, 0.0)
    rows = []
    for layer in layers:
        band, place = divmod(depth[layer], fold)
        x = place if band % 2 == 0 else fold - 1 - place
        rows.append((layer, float(x), lane[layer] + shift[band] - first, depth[layer]))
    return pd.DataFrame(rows, columns=["layer", "x", "y", "depth"])


def _depths(parents: dict[str, list[str]], children: dict[str, list[str]]) -> dict[str, int]:
    """Longest path from an input, in topological order (Kahn)."""
    waiting = {layer: len(sources) for layer, sources in parents.items()}
    order = [layer for layer, count in waiting.items() if count == 0]
    depth = dict.fromkeys(order, 0)
    reached = dict.fromkeys(order, 0)
    for layer in order:  # grows while it is read
        depth[layer] = reached[layer]
        for child in children[layer]:
            reached[child] = max(reached.get(child, 0), reached[layer] + 1)
            waiting[child] -= 1
            if waiting[child] == 0:
                order.append(child)
    stuck = [layer for layer, count in waiting.items() if count > 0]
    if stuck:
        raise ValueError(f"the edges form a cycle through {', '.join(map(repr, stuck[:5]))}.")
    return depth


def _lanes(parents: dict[str, list[str]], depth: dict[str, int]) -> dict[str, float]:
    """Place across the reading direction: near the mean of the parents, layers of one depth at least 1 apart."""
    levels: dict[int, list[str]] = {}
    for layer, level in depth.items():
        levels.setdefault(level, []).append(layer)
    lane: dict[str, float] = {}
    for level in sorted(levels):
        wished = {layer: _mean([lane[parent] for parent in parents[layer]]) for layer in levels[level]}
        ordered = sorted(levels[level], key=lambda layer: wished[layer])
        middle, centre = (len(ordered) - 1) / 2, _mean(list(wished.values()))
        for i, layer in enumerate(ordered):
            lane[layer] = wished[layer] if len(ordered) == 1 else centre + i - middle
    return lane


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
