"""Levels under a budget, against every choice there is; and what linears contribute, against what made the sums."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tawny.allocation.knapsack import choose, hull, reactions
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


@given(st.integers(0, 10**6))
def test_contributions_are_found_again_from_the_sums_over_blocks_and_over_roles(seed):
    import random

    chance = random.Random(seed)
    names = {f"{b}.{r}": (b, r) for b in range(4) for r in "qkd"}
    errors = {name: chance.uniform(0.01, 1) for name in names}
    of_b, of_r = ([chance.uniform(0.1, 9) for _ in range(4)], {r: chance.uniform(0.1, 9) for r in "qkd"})
    true = {name: errors[name] * of_b[b] * of_r[r] for name, (b, r) in names.items()}
    blocks = {b: sum(v for n, v in true.items() if names[n][0] == b) for b in range(4)}
    roles = {r: 1.7 * sum(v for n, v in true.items() if names[n][1] == r) for r in "qkd"}
    found = reactions(
        errors, {n: b for n, (b, _) in names.items()}, {n: r for n, (_, r) in names.items()}, blocks, roles
    )
    assert found == pytest.approx(true, rel=1e-6)
