"""ATP: an arithmetic progression over depth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import Atp, LinearInfo, Profile
from tawny.allocation.atp import largest_beta
from tawny.errors import RecipeError
from tests.reference import allocators as reference


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(1, 12), target=st.floats(0, 1), part=st.floats(0, 1))
def test_blocks_form_the_progression_and_the_budget_is_exact(blocks: int, target: float, part: float) -> None:
    beta = part * largest_beta(target, blocks)
    profile = reference.model(blocks)
    found = Atp(beta=beta).allocate(profile, target)
    for linear in profile.linears:
        wanted = target + beta * (linear.block - (blocks - 1) / 2)
        assert found[linear.name] == pytest.approx(wanted, abs=1.5 / linear.numel)
    assert abs(reference.removed_in_all(found, profile) - target * sum(profile.sizes.values())) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("target", "half"),
    [(0.7, 0.15), (0.6, 0.10), (0.5, 0.04), (0.65, 0.125), (0.9, 0.06), (0.99, 0.006), (0.05, 0.03)],
)
def test_without_a_step_the_band_depends_on_the_target(target: float, half: float) -> None:
    found = Atp().allocate(reference.model(32, [(100, 100)]), target)
    assert found["0.0"] == pytest.approx(target - half, abs=1e-3)
    assert found["31.0"] == pytest.approx(target + half, abs=1e-3)


def test_one_block_and_a_step_of_zero_are_uniform() -> None:
    assert set(Atp().allocate(reference.model(1), 0.5).values()) == {0.5}
    assert set(Atp(beta=0).allocate(reference.model(5), 0.5).values()) == {0.5}


def test_blocks_of_unequal_size_still_meet_the_budget() -> None:
    profile = Profile(tuple(LinearInfo(str(b), (10, 10 * (b + 1)), b) for b in range(4)))
    found = Atp().allocate(profile, 0.6)
    assert reference.removed_in_all(found, profile) == 600
    assert sorted(found.values()) == list(found.values())


@pytest.mark.parametrize("blocks", [(0, 1), (1, 2), (4, 5)])
def test_depth_is_counted_where_there_are_linears(blocks: tuple[int, int]) -> None:
    linears = tuple(LinearInfo(str(b), (100, 100), b) for b in blocks)
    measured = Profile(linears, ({},) * 8)
    for found in (Atp().allocate(Profile(linears), 0.6), Atp().allocate(measured, 0.6)):
        assert list(found.values()) == pytest.approx([0.5, 0.7])
    with pytest.raises(RecipeError, match=r"in \[0, 0\.8\] .* over 2 blocks"):
        Atp(beta=0.9).allocate(measured, 0.6)


def test_a_step_out_of_range_is_refused_with_the_range() -> None:
    with pytest.raises(RecipeError, match=r"in \[0, 0\.15\] for sparsity 0\.7 over 5 blocks"):
        Atp(beta=0.2).allocate(reference.model(5), 0.7)
