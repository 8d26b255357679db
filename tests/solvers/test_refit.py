"""The best survivors of a mask, against a Cholesky factorisation per row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tawny import precision
from tawny.errors import NumericalError
from tawny.patterns import NM, Unstructured
from tawny.solvers import Magnitude, SparseGPT, Wanda
from tawny.solvers.base import energy
from tawny.solvers.refit import refit as refit_and_judge
from tests.reference.problems import lifelike
from tests.reference.refit import objective, refit_exactly


def refit(*args: Any, **options: Any) -> Tensor:
    """The weight alone."""
    return refit_and_judge(*args, **options)[0]


def test_many_steps_reach_the_solution_of_a_cholesky_factorisation_per_row() -> None:
    W, statistics = lifelike(12, 40)
    mask = Magnitude().solve(W, None, Unstructured(), 0.6).mask
    found = refit(W, mask, statistics.hessian, steps=400, tolerance=1e-9)
    exact = refit_exactly(W, mask, statistics.hessian)
    assert torch.allclose(found.double(), exact, atol=2e-4 * float(W.abs().max()))


@pytest.mark.parametrize("solver", [Magnitude(), Wanda(), SparseGPT()])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_ten_steps_get_most_of_what_any_mask_has_to_gain(solver, pattern) -> None:
    W, statistics = lifelike(48, 64)
    H = statistics.hessian
    solution = solver.solve(W, statistics, pattern, 0.5)
    before = objective(W, solution.weight, H, 0.01)
    after = objective(W, refit(W, solution.mask, H, start=solution.weight), H, 0.01)
    best = objective(W, refit_exactly(W, solution.mask, H), H, 0.01)
    assert best <= after
    assert after - best < 0.1 * (before - best)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.floats(0, 1), steps=st.integers(0, 12))
def test_zeros_stay_and_the_objective_never_rises(seed: int, sparsity: float, steps: int) -> None:
    W, statistics = lifelike(5, 24, seed)
    W[0, :9] = 0  # zero before pruning
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
    before = W.clone(), mask.clone(), statistics.hessian.clone()
    found = refit(W, mask, statistics.hessian, steps=steps)
    assert not found[~mask].any() and not found[0, :9].any()
    start, end = (objective(W, V, statistics.hessian, 0.01) for V in (W * mask, found))
    assert end <= start * (1 + 1e-4) + 1e-9
    assert all(torch.equal(a, b) for a, b in zip(before, (W, mask, statistics.hessian), strict=True))


@pytest.mark.parametrize("steps", [1, 4])
def test_rounded_factors_gain_as_much_in_few_steps(steps: int) -> None:
    W, statistics = lifelike(48, 64)
    H = statistics.hessian
    mask = Wanda().solve(W, statistics, Unstructured(), 0.6).mask
    before = objective(W, W * mask, H, 0.01)
    exact = objective(W, refit(W, mask, H, steps=steps), H, 0.01)
    with precision.force("bfloat16"):
        weight, lost = refit_and_judge(W, mask, H, steps=steps, rounded=True)
    rounded = objective(W, weight, H, 0.01)
    assert rounded != exact
    assert before - rounded == pytest.approx(before - exact, rel=2e-3)
    assert lost == pytest.approx(energy(W - weight, H), rel=2e-3)


def test_weights_of_inputs_that_never_fire_keep_their_values() -> None:
    W, statistics = lifelike(6, 20)
    H = statistics.hessian
    H[3], H[:, 3] = 0, 0
    mask = torch.ones_like(W, dtype=torch.bool)
    mask[:, 7] = False
    for damp in (0.0, 0.01):
        assert torch.allclose(refit(W, mask, H, damp=damp)[:, 3], W[:, 3])
    assert torch.equal(refit(W, torch.ones_like(mask), H), W)
    assert torch.equal(refit(W, mask, torch.zeros_like(H)), W * mask)


def test_rows_do_not_depend_on_the_rows_beside_them(monkeypatch) -> None:
    W, statistics = lifelike(10, 32)
    mask = Wanda().solve(W, statistics, Unstructured(), 0.7).mask
    whole = refit(W, mask, statistics.hessian)
    monkeypatch.setattr("tawny.solvers.refit._CHUNK", 3 * 32)
    assert torch.allclose(refit(W, mask, statistics.hessian), whole, atol=2e-3)


def test_fewer_tokens_than_inputs_is_no_obstacle() -> None:
    W, statistics = lifelike(6, 40, tokens=5)
    mask = Wanda().solve(W, statistics, Unstructured(), 0.5).mask
    for damp in (0.0, 0.01):
        found = refit(W, mask, statistics.hessian, damp=damp, steps=60)
        assert objective(W, found, statistics.hessian) < objective(W, W * mask, statistics.hessian)


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    W, statistics = lifelike(4, 8)
    statistics.hessian[2, 3] = torch.nan
    with pytest.raises(NumericalError, match="Hessian"):
        refit(W, W != 0, statistics.hessian)


@pytest.mark.parametrize("steps", [0, 1, 5, 50])
def test_it_knows_what_is_lost(steps: int, monkeypatch) -> None:
    W, statistics = lifelike(24, 48)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) > 0.6
    monkeypatch.setattr("tawny.solvers.refit._CHUNK", 7 * 48)  # four chunks of rows
    weight, lost = refit_and_judge(W, mask, statistics.hessian, steps=steps)
    assert torch.equal(weight, refit(W, mask, statistics.hessian, steps=steps))
    assert lost == pytest.approx(energy(W - weight, statistics.hessian), rel=1e-3)
