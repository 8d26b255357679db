"""The budget is met to the weight, whatever was wished for."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import LinearInfo, Profile
from tawny.allocation.budget import exact, given_nm, mixed_bits, mixed_nm, spread_in_blocks
from tawny.errors import NumericalError, RecipeError
from tawny.patterns import removed_count
from tests.reference.allocators import model

quick = settings(deadline=None, max_examples=60)
wishes = st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 10**7)), min_size=1, max_size=30)


def named(pairs: list[tuple[float, int]]) -> tuple[dict[str, float], dict[str, int]]:
    return (
        {str(i): wish for i, (wish, _) in enumerate(pairs)},
        {str(i): size for i, (_, size) in enumerate(pairs)},
    )


def counts(allocation: dict[str, float], sizes: dict[str, int]) -> dict[str, int]:
    return {name: removed_count(sizes[name], value) for name, value in allocation.items()}


@quick
@given(wishes, st.floats(0, 1))
def test_the_total_is_exact_and_every_share_is_legal(pairs: list[tuple[float, int]], target: float) -> None:
    raw, sizes = named(pairs)
    allocation = exact(raw, sizes, target)
    assert list(allocation) == list(raw)
    assert all(0 <= value <= 1 for value in allocation.values())
    gone = counts(allocation, sizes)
    assert sum(gone.values()) == removed_count(sum(sizes.values()), target)
    assert allocation == {name: count / sizes[name] for name, count in gone.items()}


@quick
@given(wishes, st.floats(0, 1))
def test_every_count_is_within_one_weight_of_one_common_shift(pairs, target):
    raw, sizes = named(pairs)
    gone = counts(exact(raw, sizes, target), sizes)
    # The shift that explains a linear strictly inside its bounds explains all of them.
    lowest, highest = -math.inf, math.inf
    for name, count in gone.items():
        if count - 1 > 0:
            lowest = max(lowest, (count - 1) / sizes[name] - raw[name])
        if count + 1 < sizes[name]:
            highest = min(highest, (count + 1) / sizes[name] - raw[name])
    assert lowest <= highest + 1e-9


@quick
@given(wishes, st.floats(0.2, 0.8))
def test_bounds_are_kept_to_one_weight(pairs: list[tuple[float, int]], target: float) -> None:
    raw, sizes = named(pairs)
    gone = counts(exact(raw, sizes, target, low=0.1, high=0.9), sizes)
    assert all(0.1 * sizes[n] - 1 < count < 0.9 * sizes[n] + 1 for n, count in gone.items())
    assert sum(gone.values()) == removed_count(sum(sizes.values()), target)


@quick
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=30), st.floats(0, 1), st.floats(-5, 5))
def test_equal_wishes_are_uniform(sizes: list[int], target: float, wish: float) -> None:
    names = {str(i): size for i, size in enumerate(sizes)}
    allocation = exact(dict.fromkeys(names, wish), names, target)
    assert all(abs(value - target) <= 1 / names[name] for name, value in allocation.items())


def test_small_budgets_by_hand() -> None:
    sizes = {"q": 576 * 576, "k": 192 * 576}
    assert exact({"q": 9.0, "k": 9.0}, sizes, 0.5) == {"q": 0.5, "k": 0.5}  # a target that fits comes back
    assert exact({"q": 0.75, "k": 0.25}, {"q": 8, "k": 8}, 0.5) == {"q": 0.75, "k": 0.25}
    assert exact({}, {}, 0.5) == {}
    # What clamping takes the others give.
    clamped = exact({"a": -5.0, "b": 0.0, "c": 0.0}, dict.fromkeys("abc", 100), 0.5)
    assert clamped == {"a": 0.0, "b": 0.75, "c": 0.75}
    # The smallest linears are rounded so that the total still fits.
    assert sorted(exact(dict.fromkeys("abc", 0.0), dict.fromkeys("abc", 1), 2 / 3).values()) == [
        0.0,
        1.0,
        1.0,
    ]
    # The mean is weighted by parameters.
    weighted = exact({"big": 0.2, "small": 0.6}, {"big": 900, "small": 100}, 0.5)
    assert weighted["small"] - weighted["big"] == pytest.approx(0.4, abs=0.01)
    assert 900 * weighted["big"] + 100 * weighted["small"] == pytest.approx(500)


@pytest.mark.parametrize("wish", [math.nan, math.inf, -math.inf])
def test_a_wish_that_is_not_finite_is_an_error_with_its_linear(wish: float) -> None:
    with pytest.raises(NumericalError, match="for q"):
        exact({"q": wish, "k": 0.5}, {"q": 4, "k": 4}, 0.5)


def test_a_target_out_of_reach_is_refused() -> None:
    for target in (-0.1, 1.1, math.nan):
        with pytest.raises(RecipeError, match="out of reach"):
            exact({"q": 0.5}, {"q": 4}, target)
    with pytest.raises(RecipeError, match="9:8"):
        mixed_nm({}, Profile(()), 8, 9)


def profile_of(sizes: list[int]) -> Profile:
    return Profile(tuple(LinearInfo(str(i), (size, 8), i) for i, size in enumerate(sizes)))


@quick
@given(
    st.lists(st.tuples(st.floats(-1, 2), st.integers(1, 500)), min_size=1, max_size=12),
    st.sampled_from([4, 8, 16]),
    st.data(),
)
def test_mixed_n_of_m_is_exact_to_one_step_of_one_block(blocks, m, data):
    target_n = data.draw(st.integers(1, m))
    profile = profile_of([size for _, size in blocks])
    wish = {str(i): value for i, (value, _) in enumerate(blocks)}
    allocation = mixed_nm(wish, profile, m, target_n)
    n = {name: m * (1 - value) for name, value in allocation.items()}
    assert all(abs(value - round(value)) < 1e-9 and 1 <= round(value) <= m for value in n.values())
    kept = sum(round(n[str(i)]) * size for i, (_, size) in enumerate(blocks))
    assert abs(kept - target_n * sum(size for _, size in blocks)) <= max(size for _, size in blocks)


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.sampled_from([4, 8]), st.data())
def test_mixed_n_of_m_over_equal_blocks_is_exact_and_follows_the_wish(wish, m, data):
    target_n = data.draw(st.integers(1, m))
    allocation = mixed_nm(
        {str(i): value for i, value in enumerate(wish)}, profile_of([7] * len(wish)), m, target_n
    )
    n = [round(m * (1 - value)) for value in allocation.values()]
    assert sum(n) == target_n * len(wish)
    # Who is to lose clearly less never keeps less.
    assert all(n[i] >= n[j] for i, a in enumerate(wish) for j, b in enumerate(wish) if a < b - 1e-9)


def test_all_linears_of_a_block_get_the_same_n() -> None:
    profile = model(blocks=3)
    wish = {linear.name: 0.5 + 0.125 * linear.block for linear in profile.linears}
    allocation = mixed_nm(wish, profile, 8, 3)
    per_block = [{allocation[linear.name] for linear in profile.linears_of(block)} for block in range(3)]
    assert per_block == [{0.5}, {0.625}, {0.75}]


def test_given_numbers_are_a_whole_n_of_each_linear() -> None:
    given = {"a": 0.75, "b": 0.0, "c": 0.25, "d": 0.5}
    assert given_nm(given, 4) == given
    assert given_nm({"third": 0.333, "seventh": 0.143}, 3 * 7) == {
        "third": 1 - 14 / 21,
        "seventh": 1 - 18 / 21,
    }
    for sparsity, kept, legal in (
        (0.55, "1.8", r"0\.5 \(2 of 4\) or 0\.75 \(1 of 4\)"),
        (0.2, "3.2", r"0 \(4 of 4\) or 0\.25 \(3 of 4\)"),
        (1.0, "0", r"0\.75 \(1 of 4\)$"),
        (0.9, "0.4", r"0\.75 \(1 of 4\)$"),
    ):
        with pytest.raises(
            RecipeError, match=rf"q_proj is given sparsity .* keeps {kept} of every 4 .*{legal}"
        ):
            given_nm({"o_proj": 0.5, "q_proj": sparsity}, 4)


def test_rounding_to_whole_weights_is_no_spread_within_a_block() -> None:
    profile = model(blocks=3)
    even = exact({x.name: 0.3 + 0.1 * x.block for x in profile.linears}, profile.sizes, 0.4123)
    assert len(set(even.values())) > 3 and spread_in_blocks(even, profile) == {}
    last = profile.linears[-1]
    assert spread_in_blocks({**even, last.name: even[last.name] + 0.2}, profile) == {
        2: pytest.approx(0.2, abs=0.01)
    }


@quick
@given(
    wishes,
    st.sets(st.integers(2, 8), min_size=2, max_size=4),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_bits_stay_within_the_mean_and_below_it_by_less_than_a_step(pairs, bits, share, random) -> None:
    raw, sizes = named(pairs)
    levels = sorted(bits)
    mean = levels[0] + share * (levels[-1] - levels[0])
    given_bits = [*bits]
    random.shuffle(given_bits)
    found = mixed_bits(raw, sizes, given_bits, mean)
    assert found.keys() == raw.keys() and set(found.values()) <= bits
    left = mean * sum(sizes.values()) - sum(found[name] * sizes[name] for name in found)
    assert left >= -1e-6 * sum(sizes.values())
    steps = [
        (min(level for level in levels if level > found[name]) - found[name]) * sizes[name]
        for name in found
        if found[name] < levels[-1]
    ]
    assert not steps or left < min(steps) + 1e-6 * sum(sizes.values())
    for a, b in itertools.permutations(raw, 2):
        # Who would keep more has no fewer bits, but for one level, and for those that the budget cannot pay.
        if raw[a] < raw[b] and (place := levels.index(found[a])) < levels.index(found[b]) - 1:
            assert (levels[place + 1] - found[a]) * sizes[a] > left - 1e-6 * sum(sizes.values())


def test_equal_blocks_get_the_mean_exactly() -> None:
    sizes = {str(i): 100 for i in range(8)}
    found = mixed_bits({name: 0.01 * i for i, name in enumerate(sizes)}, sizes, [3, 4, 8], 3.5)
    assert sum(found.values()) == 28 and [found[name] for name in sizes] == sorted(
        found.values(), reverse=True
    )
