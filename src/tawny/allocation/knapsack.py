"""One level for each linear under a budget: the multiple-choice knapsack, and what a level costs.

Every item, such as a linear, can have one of several levels; each has a size and a cost. Wanted are the levels with the least
cost in sum whose sizes fit a budget. For a price λ of a byte every item picks its own minimum of cost + λ·size, which lies on
the lower convex hull of its levels. As λ falls the items climb their hulls, the steepest step of all first, so sorting the
steps visits what every λ would pick. Where the next step no longer fits, smaller ones still may. What they leave is spent on
single exchanges, off the hulls too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def hull(costs: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """The levels on the lower convex hull of (size, cost), by size; the first is the smallest, costs fall strictly."""
    order = sorted(range(len(sizes)), key=lambda level: (sizes[level], costs[level], level))
    kept: list[int] = []
    for level in order:
        if kept and costs[level] >= costs[kept[-1]]:
            continue
        while len(kept) > 1 and _slope(costs, sizes, kept[-2], kept[-1]) <= _slope(
            costs, sizes, kept[-2], level
        ):
            kept.pop()
        kept.append(level)
    return kept


def _slope(costs: Sequence[float], sizes: Sequence[float], a: int, b: int) -> float:
    """Cost that a byte saves between two levels."""
    return (costs[a] - costs[b]) / (sizes[b] - sizes[a])


def choose(
    costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float
) -> list[int] | None:
    """A level for each item; None where the smallest levels do not fit.

    The sum of costs is above the least possible by less than one step of one item.

    Args:
        costs, sizes: of each level of each item; finite, sizes not negative.
    """
    hulls = [hull(*item) for item in zip(costs, sizes, strict=True)]
    chosen = [levels[0] for levels in hulls]
    left = budget - math.fsum(sizes[i][level] for i, level in enumerate(chosen))
    if left < 0:
        return None
    # Slopes of one item fall, so its steps come in the order of its hull.
    steps = sorted(
        (-_slope(costs[i], sizes[i], low, high), i, place, low, high)
        for i, levels in enumerate(hulls)
        for place, (low, high) in enumerate(pairwise(levels))
    )
    for _, i, _, low, high in steps:
        step = sizes[i][high] - sizes[i][low]
        if chosen[i] == low and step <= left:
            chosen[i], left = high, left - step
    while True:
        fits = [
            (costs[i][now] - cost, i, level)
            for i, now in enumerate(chosen)
            for level, cost in enumerate(costs[i])
            if cost < costs[i][now] and sizes[i][level] - sizes[i][now] <= left
        ]
        if not fits:
            return chosen
        _, i, level = max(fits, key=lambda exchange: exchange[0])  # of equals the first
        left -= sizes[i][level] - sizes[i][chosen[i]]
        chosen[i] = level
