"""The best choices under every budget at once, where costs and losses of independent groups add up.

For a price p on cost each group takes the option of least loss + p * cost, which lies on the lower convex hull of its
options; as p falls, groups step along their hulls, steepest first. Sorting all steps by slope gives the choices for
every price: the lower convex hull of all sums, in time that hardly grows with the number of combinations.
Source: Shoham and Gersho 1988, doi.org/10.1109/29.90373 (bit allocation for arbitrary quantizers).
"""

from collections.abc import Sequence
from dataclasses import dataclass

Option = tuple[float, float]  # cost, loss


@dataclass(frozen=True)
class Choice:
    """One option for each group, by position, with the sums of cost and loss."""

    cost: float
    loss: float
    picks: tuple[int, ...]


@dataclass(frozen=True)
class _Step:
    slope: float  # loss that one unit of cost takes away, negated: the least comes first
    group: int
    position: int  # on the group's hull: the step leads there from the one before


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Positions of the options on the lower convex hull, by rising cost and falling loss.

    >>> lower_hull([(1, 10), (2, 9), (3, 1), (4, 1)])
    [0, 2]
    """
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: options[i]):
        cost, loss = options[i]
        if kept and loss >= options[kept[-1]][1]:
            continue
        while len(kept) > 1 and _slope(options[kept[-2]], options[kept[-1]]) >= _slope(options[kept[-1]], (cost, loss)):
            kept.pop()
        kept.append(i)
    return kept


def sweep(groups: Sequence[Sequence[Option]]) -> list[Choice]:
    """The lower convex hull of all combinations of one option a group, by rising cost.

    >>> [(c.cost, c.loss) for c in sweep([[(1, 8), (2, 2)], [(1, 5), (3, 1)]])]
    [(2, 13), (3, 7), (5, 3)]
    """
    hulls, steps = _prepared(groups)
    at = [0] * len(groups)
    found = [_choice(groups, hulls, at)]
    for step in steps:
        at[step.group] = step.position
        found.append(_choice(groups, hulls, at))
    return found


def within(groups: Sequence[Sequence[Option]], budget: float) -> Choice | None:
    """The sweep's last choice that costs at most `budget`, and what of the later steps still fits; None if none does.

    >>> within([[(1, 8), (2, 2)], [(1, 5), (3, 1)]], 4).picks
    (1, 0)
    """
    hulls, steps = _prepared(groups)
    at = [0] * len(groups)
    spent = _choice(groups, hulls, at).cost
    if spent > budget:
        return None
    stopped: set[int] = set()
    for step in steps:
        before, after = (groups[step.group][hulls[step.group][p]][0] for p in (step.position - 1, step.position))
        if step.group in stopped or spent + after - before > budget:
            stopped.add(step.group)
            continue
        spent, at[step.group] = spent + after - before, step.position
    return _choice(groups, hulls, at)


def _prepared(groups: Sequence[Sequence[Option]]) -> tuple[list[list[int]], list[_Step]]:
    hulls = [lower_hull(options) for options in groups]
    steps = [
        _Step(_slope(options[hull[position - 1]], options[hull[position]]), group, position)
        for group, (options, hull) in enumerate(zip(groups, hulls, strict=True))
        for position in range(1, len(hull))
    ]
    # along a hull slopes rise, so a group's steps stay in order; equal slopes by group, then position
    return hulls, sorted(steps, key=lambda step: (step.slope, step.group, step.position))


def _choice(groups: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], at: Sequence[int]) -> Choice:
    picks = tuple(hull[position] for hull, position in zip(hulls, at, strict=True))
    chosen = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    return Choice(sum(cost for cost, _ in chosen), sum(loss for _, loss in chosen), picks)


def _slope(a: Option, b: Option) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
