"""Which experts leave: against a slow twin, and by hand."""

from __future__ import annotations

import pytest
import torch

from tawny.allocation.budget import whole_experts
from tawny.allocation.profile import LinearInfo, Profile
from tawny.errors import NumericalError
from tawny.solvers.experts import leave_one_by_one, removed_experts
from tests.reference.experts import left_one_by_one


def router(experts, hidden, picks, renormalised, seed):
    W = torch.randn(experts, hidden, generator=torch.Generator().manual_seed(seed))

    def route(x, gone):
        chances = (x @ W.T).index_fill(-1, gone, -torch.inf).softmax(-1)
        gates, picked = chances.topk(picks)
        return picked, gates / gates.sum(-1, keepdim=True) if renormalised else gates

    return route


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_experts_leave_as_by_trying_each_on_all_tokens(groups, renormalised, seed):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(seed))
    felt = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed + 9)).double()
    route = router(8, 6, 2, renormalised=renormalised, seed=seed)
    removed = 4
    if not renormalised:  # gates of tokens that keep their experts change, too: only what moves is counted
        chances = torch.rand(50, 8, generator=torch.Generator().manual_seed(seed))

        def route(x, gone, chances=chances, every=x):
            rows = torch.cdist(x, every).argmin(1)
            gates, picked = chances[rows].index_fill(-1, gone, -torch.inf).topk(2)
            return picked, gates

    left, losses = leave_one_by_one(x, felt, route, removed=removed, groups=groups)
    expected, felt_after = left_one_by_one(x, felt, route, removed, groups)
    assert left.tolist() == expected
    assert losses.tolist() == pytest.approx(felt_after, rel=1e-6)


def test_lowest_leave_and_groups_lose_alike():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.5, 5.0, 4.0, 5.0, 4.0]).double()
    assert removed_experts(scores, 2).tolist() == [1, 3]
    assert removed_experts(scores, 4, groups=2).tolist() == [1, 3, 5, 7]
    with pytest.raises(NumericalError, match="score of an expert"):
        removed_experts(scores.index_fill(0, torch.tensor([0]), torch.nan), 2)


def profile(blocks, experts=8):
    linears = [
        LinearInfo(f"{block}.down.{e}", (40, 60), block, coupling=f"{block}", members=experts)
        for block in range(blocks)
        for e in range(experts)
    ]
    return Profile(tuple(linears), ())


@pytest.mark.parametrize("target", [0.1, 0.25, 0.3, 0.5])
def test_equal_wishes_cut_every_block_alike_and_unequal_ones_keep_the_total(target):
    known, limits = profile(6), {str(block): (1, 2) for block in range(6)}
    even = whole_experts({x.name: target for x in known.linears}, known, target, limits)
    assert len(set(even.values())) == 1 and abs(next(iter(even.values())) - target) <= 1 / 16
    wish = {x.name: target * (0.5 + x.block / 5) for x in known.linears}
    shared = whole_experts(wish, known, target, limits)
    removed = [round(8 * shared[f"{block}.down.0"]) for block in range(6)]
    assert removed[0] < removed[-1] if target > 0.1 else max(removed) == 1
    assert abs(sum(removed) - 48 * target) <= 0.5 + 1e-9
