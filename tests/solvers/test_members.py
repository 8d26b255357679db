"""Solvers of whole channels and heads against their twins, and what all of them promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.calibration.statistics import Accumulator, Statistics
from tawny.errors import NumericalError
from tawny.solvers import Flap, Magnitude, Obs, Wanda
from tawny.solvers.members import Coupled, Producer
from tests.reference import members

SOLVERS = [Magnitude(), Wanda(), Flap(), Obs(), Obs(group=1)]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)


def problem(count: int, size: int, seed: int = 0, biased: bool = False) -> tuple[Coupled, torch.Tensor]:
    """A coupling of `count` members of `size` columns, and the inputs of its consumer."""
    dice = torch.Generator().manual_seed(seed)
    width, out = count * size, 5
    mixing = torch.randn(width, width, generator=dice)
    X = torch.randn(4 * width + 8, width, generator=dice) @ mixing / width**0.5
    X += torch.randn(width, generator=dice)
    seen = _seen(X)
    columns = torch.arange(width).view(count, size)
    hidden = torch.randn(20, 6, generator=dice)
    rows = torch.randperm(2 * count, generator=dice).view(count, 2)
    producer = Producer(torch.randn(2 * count, 6, generator=dice), _seen(hidden), rows)
    W = torch.randn(out, width, generator=dice)
    return Coupled(W, seen, columns, [producer], biased), X


def _seen(X: torch.Tensor) -> Statistics:
    accumulator = Accumulator(X.shape[1], "hessian")
    accumulator.add(X)
    return accumulator.finish()


def lost(coupled: Coupled, X: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None) -> float:
    apart = X @ (coupled.weight - weight).T
    return float((apart if shift is None else apart - shift).double().square().sum())


@each_solver
@settings(deadline=None, max_examples=20)
@given(count=st.integers(2, 9), size=st.integers(1, 4), share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_so_many_members_leave_as_a_whole(solver, count, size, share, seed):
    coupled, _ = problem(count, size, seed)
    before, removed = coupled.weight.clone(), int(share * count)
    made = solver.choose(coupled, removed)
    assert int(made.keep.sum()) == count - removed and torch.equal(coupled.weight, before)
    assert not made.weight[:, coupled.columns[~made.keep].flatten()].any()
    assert removed or torch.equal(made.weight, before)


@given(count=st.integers(2, 7), size=st.integers(1, 3), removed=st.integers(0, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_obs_is_the_greedy_choice_of_least_squares(count, size, removed, seed):
    coupled, _ = problem(count, size, seed)
    removed = min(removed, count - 1)
    H = coupled.seen.hessian.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    keep, weight = members.greedy(coupled.weight, H, coupled.columns, removed)
    made = Obs(group=1).choose(coupled, removed)
    assert made.keep.tolist() == keep
    assert torch.allclose(made.weight.double(), weight, rtol=1e-3, atol=1e-3 * float(weight.abs().max()))


@pytest.mark.parametrize("delayed", [1, 6])
@pytest.mark.parametrize("size", [1, 3])
def test_obs_chooses_alike_however_seldom_it_writes_the_inverse(monkeypatch, size, delayed):
    coupled, _ = problem(30, size)
    seldom = Obs(group=2).choose(coupled, 20)
    monkeypatch.setattr("tawny.solvers.obs._DELAYED", delayed)
    often = Obs(group=2).choose(coupled, 20)
    assert torch.equal(seldom.keep, often.keep)
    torch.testing.assert_close(seldom.weight, often.weight, rtol=1e-4, atol=1e-4)


def test_obs_loses_less_than_leaving_the_rest_alone_and_still_less_with_a_bias():
    plain, X = problem(12, 2)
    biased, _ = problem(12, 2, biased=True)
    errors = []
    for solver, coupled in ((Flap(bias=False), plain), (Obs(), plain), (Obs(), biased)):
        made = solver.choose(coupled, 6)
        errors.append(lost(coupled, X, made.weight, made.shift if coupled.biased else None))
    assert errors[1] < 0.7 * errors[0] and errors[2] < errors[1]


def test_flap_takes_what_fluctuates_least_and_gives_the_mean_back():
    coupled, X = problem(9, 2)
    made = Flap().choose(coupled, 4)
    assert made.keep.tolist() == members.lowest(members.fluctuation(coupled.weight, coupled.columns, X), 4)
    apart = X @ (coupled.weight - made.weight).T
    assert torch.allclose(made.shift, apart.mean(0), rtol=1e-3, atol=1e-3)
    assert lost(coupled, X, made.weight, made.shift) < lost(coupled, X, made.weight, None)


def test_wanda_and_magnitude_sum_the_scores_of_all_weights_of_a_member():
    coupled, _ = problem(7, 2)
    (producer,) = coupled.producers
    for solver, heard in ((Magnitude(), False), (Wanda(), True)):
        norms = [
            s.squared_norms.sqrt() if heard else torch.ones(len(s.squared_norms))
            for s in (coupled.seen, producer.seen)
        ]
        rows = [(producer.weight, producer.rows, norms[1])]
        scores = members.summed(coupled.weight, coupled.columns, rows, norms[0])
        assert solver.choose(coupled, 3).keep.tolist() == members.lowest(scores, 3)


def test_members_that_are_zero_already_leave_first():
    coupled, _ = problem(8, 2)
    coupled.weight[:, coupled.columns[[2, 5]].flatten()] = 0
    for rows in coupled.producers:
        rows.weight[rows.rows[[2, 5]].flatten()] = 0
    for solver in SOLVERS:
        assert not solver.choose(coupled, 2).keep[[2, 5]].any()


def test_what_was_pruned_before_stays_pruned_and_the_rest_makes_up_for_it():
    coupled, X = problem(8, 2)
    gone = torch.rand(coupled.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    coupled.weight[gone] = 0
    for solver in SOLVERS:
        made = solver.choose(coupled, 3)
        assert not made.weight[gone].any()
    obs = Obs().choose(coupled, 3)
    plain = torch.zeros_like(obs.weight)
    kept = coupled.columns[obs.keep].flatten()
    plain[:, kept] = coupled.weight[:, kept]
    assert lost(coupled, X, obs.weight, obs.shift) < 0.9 * lost(coupled, X, plain, None)


def test_numbers_that_are_not_finite_are_refused():
    coupled, _ = problem(4, 1)
    coupled.weight[0, 0] = torch.nan
    for solver in SOLVERS:
        with pytest.raises(NumericalError, match="weight"):
            solver.choose(coupled, 1)
