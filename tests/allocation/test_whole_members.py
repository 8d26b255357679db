"""Budgets in whole members: exact to one member of one block, alike for blocks that are wanted alike."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation.budget import given_members, whole_members
from tawny.allocation.profile import LinearInfo, Profile
from tawny.errors import RecipeError


def stack(blocks: int, channels: int = 600, groups: int = 3, heads: bool = True) -> Profile:
    """Blocks of an FFN with a cost of 24 a channel, and attention with a cost of 640 a group."""
    linears = []
    for block in range(blocks):
        down, o = f"{block}.down", f"{block}.o"
        linears += [LinearInfo(f"{block}.up", (2 * channels, 8), block, coupling=down, members=channels)]
        linears += [LinearInfo(down, (8, channels), block, coupling=down, members=channels)]
        if heads:
            linears += [LinearInfo(f"{block}.qkv", (groups * 40, 8), block, coupling=o, members=groups)]
            linears += [LinearInfo(o, (8, groups * 40), block, coupling=o, members=groups)]
    return Profile(tuple(linears))


def spent(allocation: dict[str, float], profile: Profile) -> float:
    return sum(allocation[x.name] * x.numel for x in profile.linears)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 6),
    st.floats(0, 0.95),
    st.booleans(),
    st.lists(st.floats(-0.3, 0.3), min_size=6, max_size=6),
)
def test_the_budget_is_met_to_one_member_or_a_thousandth(blocks, target, heads, spread):
    profile = stack(blocks, heads=heads)
    wish = {x.name: min(1.0, max(0.0, target + spread[x.block])) for x in profile.linears}
    try:
        made = whole_members(wish, profile, target)
    except RecipeError:
        assert target > 0.9
        return
    total = sum(profile.sizes.values())
    assert abs(spent(made, profile) - target * total) <= max(24, 1e-3 * total)
    for x in profile.linears:
        count = made[x.name] * x.members
        assert abs(count - round(count)) < 1e-9 and round(count) < x.members
        assert made[x.name] == made[x.coupling]


@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 0.5])
def test_blocks_that_are_wanted_alike_keep_equal_widths(target):
    profile = stack(5)
    made = whole_members(dict.fromkeys(profile.sizes, target), profile, target)
    assert (
        len({made[f"{block}.o"] for block in range(5)})
        == len({made[f"{block}.down"] for block in range(5)})
        == 1
    )


@pytest.mark.parametrize(("target", "gone"), [(0.3, 0), (0.34, 1), (0.5, 1), (0.66, 1), (0.67, 2)])
def test_a_head_goes_once_its_share_pays_for_it_and_channels_pay_for_the_rest(target, gone):
    profile = stack(2)
    made = whole_members(dict.fromkeys(profile.sizes, target), profile, target)
    assert round(made["0.o"] * 3) == round(made["1.o"] * 3) == gone
    assert abs(spent(made, profile) - target * sum(profile.sizes.values())) <= 24


def test_heads_pay_for_what_channels_cannot():
    profile = stack(2, channels=20)
    made = whole_members(dict.fromkeys(profile.sizes, 0.6), profile, 0.6)
    assert made["0.down"] <= 19 / 20 and made["0.o"] >= 1 / 3
    assert abs(spent(made, profile) - 0.6 * sum(profile.sizes.values())) <= 640


def test_heads_alone_are_spread_over_depth_where_equal_widths_would_miss_the_target():
    profile = Profile(tuple(x for x in stack(6).linears if x.coupling.endswith("o")))
    made = whole_members(dict.fromkeys(profile.sizes, 0.2), profile, 0.2)
    counts = [round(made[f"{block}.o"] * 3) for block in range(6)]
    assert (
        sum(counts) in (3, 4) and max(counts) == 1 and counts not in ([1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0])
    )


def test_a_target_that_leaves_a_block_without_heads_says_what_is_possible():
    profile = Profile(tuple(x for x in stack(2).linears if x.coupling.endswith("o")))
    with pytest.raises(RecipeError, match=r"0\.o has 3 members and keeps one.*0\.6666"):
        whole_members(dict.fromkeys(profile.sizes, 0.7), profile, 0.7)


@pytest.mark.parametrize("target", [0.3, 0.31, 0.45, 0.6])
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_experts_of_a_block_that_are_wanted_alike_lose_equally_many(target, spread):
    linears = [LinearInfo("0.o", (8, 80), 0, coupling="0.o", members=2)]
    for block in range(3):
        for expert in range(4):
            down = f"{block}.{expert}.down"
            linears += [LinearInfo(f"{block}.{expert}.up", (96, 8), block, coupling=down, members=48)]
            linears += [LinearInfo(down, (8, 48), block, coupling=down, members=48)]
    profile = Profile(tuple(linears))
    # An allocator rounds its wishes to whole weights, so that equal ones differ by one.
    wish = {x.name: target + spread * x.block + (i % 2) / x.numel for i, x in enumerate(linears)}
    made = whole_members(wish, profile, target)
    for block in range(3):
        assert len({made[f"{block}.{expert}.down"] for expert in range(4)}) == 1
    assert abs(spent(made, profile) - target * sum(profile.sizes.values())) <= 4 * 24


def test_experts_of_a_block_that_are_wanted_otherwise_lose_otherwise():
    linears = [LinearInfo(f"0.{e}", (8, 48), 0, coupling=f"0.{e}", members=48) for e in range(4)]
    profile = Profile(tuple(linears))
    made = whole_members({x.name: 0.2 + 0.1 * i for i, x in enumerate(linears)}, profile, 0.35)
    assert sorted(made.values()) == list(made.values()) and len(set(made.values())) == 4


def test_numbers_given_on_purpose_are_taken_as_the_nearest_whole_members():
    profile = stack(1)
    made = given_members({"0.up": 0.25, "0.down": 0.25, "0.qkv": 0.33, "0.o": 0.33}, profile)
    assert made["0.down"] == 150 / 600 and made["0.qkv"] == 1 / 3
