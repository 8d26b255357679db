"""Moves of whole members: the linears of a coupling share a level, and the budget is met to one of the smallest members."""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tawny
from tawny.allocation.budget import whole_members
from tawny.allocation.profile import LinearInfo, Profile
from tawny.choosing.member_space import make_member_space
from tawny.errors import RecipeError
from tawny.model.stack import live_stack
from tests.choosing.parts import solved_levels
from tests.tiny import tiny_model, tokens


def linears(blocks: int, width: int, heads: int, channels: int) -> tuple[LinearInfo, ...]:
    """A block's heads and channels: two linears each, and each head as wide as 8."""
    made = []
    for block in range(blocks):
        name, wide = f"b{block}", 8 * heads
        made += [
            LinearInfo(f"{name}.v", (wide, width), block, coupling=f"{name}.o", members=heads),
            LinearInfo(f"{name}.o", (width, wide), block, coupling=f"{name}.o", members=heads),
            LinearInfo(f"{name}.up", (channels, width), block, coupling=f"{name}.down", members=channels),
            LinearInfo(f"{name}.down", (width, channels), block, coupling=f"{name}.down", members=channels),
        ]
    return tuple(made)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(40, 200),
    st.floats(0.05, 0.7),
    st.integers(0, 10**6),
)
def test_moves_keep_the_budget_to_a_member_and_couplings_whole(blocks, heads, channels, target, seed):
    infos, chance = linears(blocks, 16, heads, channels), random.Random(seed)
    space = make_member_space(infos, target, 7)
    uniform = whole_members({x.name: target for x in infos}, Profile(infos), target)
    assert space.allocation(space.uniform) == uniform
    budget = sum(uniform[x.name] * x.numel for x in infos)
    levels = space.uniform
    for _ in range(20):
        levels = space.mutated(levels, chance)
        allocation = space.allocation(levels)
        removed = [allocation[x.name] * x.members for x in infos]
        for first, second in zip(infos[::2], infos[1::2], strict=True):
            assert allocation[first.name] == allocation[second.name]
            assert levels[infos.index(first)] == levels[infos.index(second)]
        assert all(count == pytest.approx(round(count)) for count in removed)
        assert all(0 <= round(count) < x.members for count, x in zip(removed, infos, strict=True))
        spent = sum(allocation[x.name] * x.numel for x in infos)
        assert abs(spent - budget) <= 2 * 16  # one channel
        excess = sum(levels[unit.places[0]] * unit.step * unit.weight for unit in space.units)
        assert space.nearest(allocation) == levels or excess


def test_a_head_may_go_and_channels_come_back_for_it():
    infos = linears(2, 16, 3, 60)
    space = make_member_space(infos, 0.3, 7)
    assert space.allocation(space.uniform)["b0.v"] == 0  # its share does not pay for a head
    chance, levels, seen = random.Random(0), space.uniform, set()
    for _ in range(200):
        levels = space.mutated(levels, chance)
        seen.add(round(3 * space.allocation(levels)["b0.v"]))
    assert seen == {0, 1, 2}


def test_equal_experts_of_a_block_lose_equally_many():
    infos = tuple(
        LinearInfo(f"b{block}.{expert}.{name}", shape, block, coupling=f"b{block}.{expert}.down", members=24)
        for block in range(3)
        for expert in range(4)
        for name, shape in (("up", (24, 16)), ("down", (16, 24)))
    )
    space = make_member_space(infos, 0.3, 7)
    chance, levels, seen = random.Random(0), space.uniform, set()
    for _ in range(50):
        levels = space.mutated(levels, chance)
        allocation = space.allocation(levels)
        for block in range(3):
            (share,) = {allocation[x.name] for x in infos if x.block == block}
            seen.add(share)
    assert len(seen) > 2


def test_experts_that_were_given_unequal_shares_lose_their_mean():
    experts = tuple(
        LinearInfo(f"b0.experts.{n}.{role}", (100, 16), 0, coupling=f"b0.experts.{n}.down", members=100)
        for n in range(4)
        for role in ("up", "down")
    )
    space = make_member_space(experts + linears(2, 16, 2, 100)[4:], 0.5, 11)
    wish = {x.name: 0.5 for x in space.linears}
    for n, share in enumerate((0.8, 0.4, 0.4, 0.4)):
        wish |= {f"b0.experts.{n}.{role}": share for role in ("up", "down")}
    assert space.within(wish) == space.within(dict.fromkeys(wish, 0.5))


def test_where_nothing_can_come_back_nothing_moves():
    for infos, target in ((linears(2, 16, 3, 60), 0.0), (linears(1, 16, 1, 1), 0.0)):
        space = make_member_space(infos, target, 7)
        assert space.low == space.high == 0 and space.bytes_in(torch.float32) == 0
        assert space.mutated(space.uniform, random.Random(0)) == space.uniform


def test_a_target_beyond_all_members_says_what_is_possible():
    with pytest.raises(RecipeError, match="the most that is possible is"):
        make_member_space(linears(2, 16, 1, 4), 0.9, 5)


@pytest.mark.parametrize("solver", ["obs", "flap", "wanda", "magnitude"])
def test_the_solutions_of_level_0_are_the_weights_of_a_uniform_run(solver, tmp_path):
    keys = {"sparsity": 0.4, "pattern": "channels+heads", "solver": solver}
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, space, store, _, _ = solved_levels(model, tmp_path / "levels", count=3, windows=2, **keys)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pruned = tiny_model("llama")
    tawny.prune(pruned, calibration=tokens(4, 24), allocator="uniform", compute="float32", **keys)
    stack, dense = live_stack(pruned), live_stack(model)
    for index in range(len(stack)):
        store.open(index)
        for linear, own in zip(stack.linears(index), dense.linears(index), strict=True):
            stored = store.read(linear, 0)
            expected = dense.weight(own) if stored is None else stored
            torch.testing.assert_close(expected, stack.weight(linear), rtol=0, atol=0)
    assert any(space.sparsity(i, 0) > 0 for i in range(len(space.linears)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_members_are_searched_and_prune_takes_the_file(family, tmp_path):
    """gpt2's biases are compensated while finalists are pruned, and are as they were afterwards."""
    keys = {"sparsity": 0.3, "pattern": "channels+heads", "solver": "obs", "compute": "float32"}
    few = {"search.trials": 12, "search.offspring": 4, "search.levels": 3, "search.windows": 2}
    few |= {"search.candidates": "owl,atp", "calibration": tokens(8, 24)}
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tawny.search(model, tmp_path / "a.yaml", **keys, **few)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    said = re.search(
        r" -s (\S+) -p channels\+heads -o compute=float32 -a a\.yaml", (tmp_path / "a.yaml").read_text()
    )
    assert said and float(said[1]) == pytest.approx(0.3, abs=3e-3)  # four experts lose a channel each
    given = {"allocator": "file", "allocator.path": str(tmp_path / "a.yaml")}
    record = tawny.prune(model, calibration=tokens(8, 24), **{**keys, "sparsity": float(said[1])}, **given)
    assert record.allocation == pytest.approx(found.allocation)
