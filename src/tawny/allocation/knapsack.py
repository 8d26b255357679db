"""One level for each linear under a budget: the multiple-choice knapsack, and what a level costs.

Every item, such as a linear, can have one of several levels; each has a size and a cost. Wanted are the levels with the least
cost in sum whose sizes fit a budget. For a price λ of a byte every item picks its own minimum of cost + λ·size, which lies on
the lower convex hull of its levels. As λ falls the items climb their hulls, the steepest step of all first, so sorting the
steps visits what every λ would pick. Where the next step no longer fits, smaller ones still may. What they leave is spent on
single exchanges, off the hulls too.

`reactions` says what an item costs: how much the model's output reacts to a relative error of each linear, from one
measurement for each block and one for each role, such as all `q_proj` together, instead of one for each linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

__all__ = ["choose", "hull", "reactions"]

_ROUNDS = 200  # of fitting; a few are enough where blocks and roles agree


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


def reactions(
    errors: Mapping[str, float],
    block: Mapping[str, int],
    role: Mapping[str, str],
    of_block: Mapping[int, float],
    of_role: Mapping[str, float],
) -> dict[str, float]:
    """What each linear contributes to the output's divergence when it has its relative error.

    A linear's share is its error × a factor of its block × a factor of its role; the factors are those whose sums over a
    block and over a role are what was measured (iterative proportional fitting: Deming and Stephan 1940). Blocks measured
    alone and roles measured alone need not add up to the same, because errors interact: blocks keep their sum.

    Args:
        errors: relative error of each linear while it was measured.
        of_block, of_role: divergence with all linears of a block, or of a role, in error; not negative.
    """
    total, roles = math.fsum(of_block.values()), math.fsum(of_role.values())
    scale = total / roles if roles > 0 else 0.0
    slopes = {name: max(0.0, error) for name, error in errors.items()}

    def fit(key: Callable[[str], object], wanted: Mapping[object, float]) -> float:
        sums: dict[object, float] = {}
        for name, share in slopes.items():
            sums[key(name)] = sums.get(key(name), 0.0) + share
        factors = {each: wanted[each] / value if value > 0 else 0.0 for each, value in sums.items()}
        for name in slopes:
            slopes[name] *= factors[key(name)]
        return max((abs(value - 1) for value in factors.values() if value > 0), default=0.0)

    blocks: dict[object, float] = dict(of_block.items())
    scaled: dict[object, float] = {each: value * scale for each, value in of_role.items()}
    for _ in range(_ROUNDS):
        fit(lambda name: role[name], scaled)
        if fit(lambda name: block[name], blocks) < 1e-9:
            break
    return slopes
