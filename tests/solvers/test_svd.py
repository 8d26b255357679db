"""Low rank by the singular values of W·L: what is lost, the budget, and the front door."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tawny
from tawny.allocation.budget import whole_ranks
from tawny.allocation.profile import LinearInfo, Profile
from tawny.errors import RecipeError
from tawny.patterns import Unstructured
from tawny.solvers import Svd, energy
from tests.reference.problems import lifelike
from tests.reference.svd import nearest
from tests.tiny import tiny_model, tokens


@settings(deadline=None, max_examples=25)
@given(out=st.integers(2, 9), width=st.integers(2, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_is_lost_are_the_squared_singular_values_that_were_dropped(out, width, share, seed):
    W, seen = lifelike(out, width, seed=seed)
    solver = Svd(damp=0.1)
    solution = solver.solve(W, seen, Unstructured(), share)
    rank, L = int(solution.notes["rank"]), solver.prepare(seen)
    dropped = torch.linalg.svdvals(W.double() @ L.double())[rank:].square().sum()
    whole = energy(W, L @ L.T)
    assert energy(W - solution.weight, L @ L.T) == pytest.approx(float(dropped), rel=1e-3, abs=1e-5 * whole)
    twin = nearest(W, seen.hessian, 0.1, rank)
    assert torch.allclose(solution.weight.double(), twin, atol=1e-3 * float(W.abs().max()))


@settings(deadline=None, max_examples=50)
@given(target=st.floats(0, 0.8), spread=st.lists(st.floats(-0.3, 0.3), min_size=4, max_size=4))
@example(target=0.015718081328952582, spread=[0.0] * 4)
def test_the_numbers_of_all_factors_meet_the_budget_to_one_rank(target, spread):
    shapes = [(480, 320), (320, 480), (640, 640), (160, 960)]
    profile = Profile(tuple(LinearInfo(str(i), shape, 0) for i, shape in enumerate(shapes)))
    made = whole_ranks({x.name: target + spread[int(x.name)] for x in profile.linears}, profile, target)
    ranks = {x.name: (1 - made[x.name]) * x.numel / sum(x.shape) for x in profile.linears}
    assert all(abs(rank - round(rank)) < 1e-6 and round(rank) >= 1 for rank in ranks.values())
    held, wanted = (
        sum(ranks[x.name] * sum(x.shape) for x in profile.linears),
        (1 - target) * sum(profile.sizes.values()),
    )
    assert held <= wanted + 1 and (held > wanted - 1120 or min(made.values()) < 1120 / 153600)
    with pytest.raises(RecipeError, match="most that is possible"):
        whole_ranks(dict.fromkeys(made, 0.999), profile, 0.999)


def test_every_linear_has_the_rank_that_was_asked_for():
    model = tiny_model("llama")
    keys = {"sparsity": 0.4, "pattern": "rank", "calibration": tokens(4, 24)}
    record = tawny.prune(model, allocator="owl", **keys)
    assert record.recipe["solver"]["name"] == "svd" and {x.pattern for x in record.linears} == {"rank"}
    modules = dict(model.named_modules())
    for entry in record.linears:
        weight = modules[entry.name].weight.detach().double()
        assert int(torch.linalg.matrix_rank(weight, rtol=1e-5)) == entry.notes["rank"]
    with pytest.raises(RecipeError, match="leave refit, refine and values out"):
        tawny.prune(model, allocator="owl", **keys, **{"refine.epochs": 1})
