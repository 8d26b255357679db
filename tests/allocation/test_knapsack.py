"""Levels under a budget, against every choice there is."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tawny.allocation.knapsack import choose, hull
from tests.reference.knapsack import best_choice

LEVELS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), min_size=1, max_size=4)


@given(st.lists(LEVELS, min_size=1, max_size=5), st.integers(0, 160))
def test_a_choice_fits_and_is_within_one_step_of_the_best_one(items, budget):
    costs = [[float(cost) for cost, _ in item] for item in items]
    sizes = [[size for _, size in item] for item in items]
    best = best_choice(costs, sizes, budget)
    chosen = choose(costs, sizes, budget)
    assert (chosen is None) == (best is None)
    if chosen is None:
        return
    assert sum(sizes[i][level] for i, level in enumerate(chosen)) <= budget
    spent = math.fsum(costs[i][level] for i, level in enumerate(chosen))
    steps = [
        costs[i][low] - costs[i][high]
        for i in range(len(items))
        for low, high in zip(hull(costs[i], sizes[i]), hull(costs[i], sizes[i])[1:], strict=False)
    ]
    assert best <= spent <= best + max(steps, default=0.0)
    if budget >= sum(max(item) for item in sizes):
        assert spent == sum(min(item) for item in costs)


def test_levels_that_a_mixture_of_others_beats_are_used_only_to_fill():
    costs, sizes = [[9.0, 8.0, 1.0]], [[1, 2, 3]]
    assert hull(costs[0], sizes[0]) == [0, 2]
    assert (
        choose(costs, sizes, 3) == [2] and choose(costs, sizes, 2) == [1] and choose(costs, sizes, 0) is None
    )
