"""Erdős–Rényi sparsities from shapes alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import Er, ErPlus, LinearInfo, Profile
from tawny.errors import RecipeError
from tests.reference import allocators as reference

side = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(side, side), min_size=1, max_size=8), target=st.floats(0, 0.99))
def test_densities_follow_the_sides_and_the_budget_is_exact(shapes, target: float) -> None:
    profile = Profile(tuple(LinearInfo(str(i), shape, 0) for i, shape in enumerate(shapes)))
    found = Er().allocate(profile, target)
    wanted = reference.er(profile, target)
    for linear in profile.linears:
        assert found[linear.name] == pytest.approx(wanted[linear.name], abs=1.5 / linear.numel)
    assert reference.removed_in_all(found, profile) == round(target * sum(profile.sizes.values()))


def test_what_would_be_more_than_dense_is_dense_and_equal_shapes_are_pruned_alike() -> None:
    profile = Profile((LinearInfo("small", (2, 2), 0), LinearInfo("large", (100, 100), 0)))
    assert Er().allocate(profile, 0.5) == {"small": 0, "large": pytest.approx(5002 / 10000)}
    assert set(Er().allocate(reference.model(4, [(100, 100)]), 0.7).values()) == {0.7}
    for target in (0.0, 1e-300, 1e-15, 1e-9):
        assert all(value <= 1e-6 for value in Er().allocate(reference.model(2), target).values())


@settings(max_examples=40, deadline=None)
@given(blocks=st.integers(2, 5), target=st.floats(0, 0.79))
def test_er_plus_keeps_the_last_linear_dense_and_the_budget_exact(blocks: int, target: float) -> None:
    profile = reference.model(blocks)
    found = ErPlus().allocate(profile, target)
    assert found[profile.linears[-1].name] == 0
    assert abs(reference.removed_in_all(found, profile) - target * sum(profile.sizes.values())) <= 1
    assert all(0 <= value <= 1 for value in found.values())


def test_er_plus_refuses_a_sparsity_that_leaves_less_than_the_last_linear() -> None:
    with pytest.raises(RecipeError, match=r"er-plus keeps 0\.2 dense.*lower sparsity"):
        ErPlus().allocate(reference.model(1), 0.8)
    with pytest.raises(RecipeError, match="er-plus"):
        ErPlus().allocate(reference.model(1, [(4, 4)]), 0.5)
