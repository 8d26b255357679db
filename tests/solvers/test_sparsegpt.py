"""SparseGPT against the paper's own column loop, and its behaviour where the paper's code stumbles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.patterns import NM, Unstructured, removed_count
from tawny.solvers import SparseGPT, energy, reconstruction_error
from tests.reference.problems import lifelike
from tests.reference.sparsegpt import sparsegpt


def close(solution: Any, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, mask = expected
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("group", [128, 32, 20, 1])
@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.37, 0.7])
def test_it_is_the_papers_sweep(group: int, scope: Any, sparsity: float) -> None:
    W, statistics = lifelike(24, 90)
    solution = SparseGPT(group=group).solve(W, statistics, Unstructured(scope), sparsity)
    removed = removed_count(W.numel(), sparsity)
    close(solution, sparsegpt(W, statistics.hessian, removed=removed, by_row=scope == "row", group=group))


@pytest.mark.parametrize("nm", [(2, 4), (3, 8), (1, 2), (5, 20), (4, 4)])
@pytest.mark.parametrize("group", [128, 30])
def test_n_of_m_is_chosen_from_weights_that_are_already_updated(nm: tuple[int, int], group: int) -> None:
    W, statistics = lifelike(24, 160)
    solution = SparseGPT(group=group).solve(W, statistics, NM(*nm), 0.5)
    close(solution, sparsegpt(W, statistics.hessian, nm=nm))


def test_the_default_scope_is_the_matrix() -> None:
    W, statistics = lifelike(24, 90)
    default, matrix = (SparseGPT().solve(W, statistics, Unstructured(s), 0.6) for s in (None, "matrix"))
    assert torch.equal(default.weight, matrix.weight)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 300), st.floats(0, 1), st.integers(1, 64), st.integers(0, 10**6))
def test_the_rounding_remainder_is_carried_from_group_to_group(out, width, sparsity, group, seed):
    W, statistics = lifelike(out, max(width, 3), seed, tokens=50)
    solution = SparseGPT(group=group).solve(W, statistics, Unstructured(), sparsity)
    removed = removed_count(W.numel(), sparsity)
    assert int((~solution.mask).sum()) == removed
    done = 0
    for start in range(0, W.shape[1], group):
        done += int((~solution.mask[:, start : start + group]).sum())
        due = removed * min(start + group, W.shape[1]) / W.shape[1]
        assert abs(done - due) <= 0.5 + 1e-9


def test_survivors_make_up_for_what_is_lost() -> None:
    W, statistics = lifelike(40, 64)
    solution = SparseGPT().solve(W, statistics, Unstructured(), 0.6)
    masked = torch.where(solution.mask, W, 0)
    updated, untouched = (reconstruction_error(W, w, statistics.hessian) for w in (solution.weight, masked))
    assert updated < 0.5 * untouched


@pytest.mark.parametrize("pattern", [Unstructured("matrix"), Unstructured("row"), NM(2, 4)])
@pytest.mark.parametrize("damp", [0.001, 0.1, 3.0])
@pytest.mark.parametrize("strange", [False, True])
def test_it_knows_the_error_it_makes(pattern: Any, damp: float, strange: bool) -> None:
    W, statistics = lifelike(40, 160)
    if strange:  # inputs that never fire, and weights that are zero already
        for lines in (statistics.hessian, statistics.hessian.t()):
            lines[3:7] = 0
        W[::3, ::5] = 0
    solution = SparseGPT(damp=damp, group=64).solve(W, statistics, pattern, 0.6)
    assert solution.lost == pytest.approx(energy(W - solution.weight, statistics.hessian), rel=1e-3)


def test_an_error_that_damping_drowns_is_not_guessed() -> None:
    W, statistics = lifelike(20, 60)
    assert SparseGPT(damp=1e6).solve(W, statistics, Unstructured(), 0.6).lost is None


def test_the_last_columns_of_a_row_make_its_error_stationary() -> None:
    """With everything to its left fixed, the last kept column is the least-squares answer."""
    W, statistics = lifelike(6, 32)
    solution = SparseGPT(damp=0.0).solve(W, statistics, Unstructured("row"), 0.5)
    H = statistics.hessian.double()
    gradient = (solution.weight.double() - W.double()) @ H
    last = solution.mask[:, -1]
    assert last.any()
    scale = (W.double() @ H).abs().max()
    assert (gradient[last, -1].abs() / scale < 1e-5).all()


def test_more_zeros_than_the_budget_asks_for_change_nothing() -> None:
    W, statistics = lifelike(10, 40)
    W[:, ::2] = 0
    solution = SparseGPT(group=16).solve(W, statistics, Unstructured(), 0.3)
    assert torch.equal(solution.weight, W)


def test_a_dead_input_beyond_the_budget_keeps_its_weights() -> None:
    W, statistics = lifelike(10, 16)
    statistics.hessian[:8] = 0
    statistics.hessian[:, :8] = 0
    solution = SparseGPT(group=4).solve(W, statistics, Unstructured(), 0.25)
    assert solution.notes["dead_inputs"] == 8
    assert bool(solution.mask[:, 8:].all()) and int((~solution.mask).sum()) == 40
    assert torch.equal(solution.weight, torch.where(solution.mask, W, 0))


def test_a_singular_hessian_needs_only_the_ordinary_damping() -> None:
    W, statistics = lifelike(10, 64, tokens=8)
    solution = SparseGPT().solve(W, statistics, Unstructured(), 0.5)
    assert solution.notes["damp"] == 0.01 and bool(torch.isfinite(solution.weight).all())


def indefinite(depth: float) -> Statistics:
    """A matrix no XᵀX can be, its lowest eigenvalue being `−depth` times the mean of the diagonal."""
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1 + depth
    return Statistics(9, torch.ones(8), H)


@pytest.mark.parametrize(("depth", "damp"), [(0.05, 0.1), (0.5, 1.0), (5.0, 10.0)])
def test_a_factorisation_that_fails_gets_ten_times_the_damping(depth: float, damp: float) -> None:
    solution = SparseGPT().solve(torch.ones(3, 8), indefinite(depth), Unstructured(), 0.5)
    assert solution.notes["damp"] == pytest.approx(damp)


def test_damping_grows_from_zero_and_after_three_tries_it_is_an_error_and_never_an_identity() -> None:
    singular = Statistics(1, torch.ones(8), torch.ones(8, 8))
    assert SparseGPT(damp=0.0).prepare(singular).damp > 0
    with pytest.raises(NumericalError, match=r"\[8, 8\] cannot be factorised even with damping 10"):
        SparseGPT().solve(torch.ones(3, 8), indefinite(50.0), Unstructured(), 0.5)


def test_damping_does_not_depend_on_the_scale_of_the_inputs() -> None:
    W, statistics = lifelike(10, 32)
    louder = Statistics(statistics.tokens, statistics.squared_norms * 2**20, statistics.hessian * 2**20)
    first, second = (SparseGPT().solve(W, s, Unstructured(), 0.5) for s in (statistics, louder))
    torch.testing.assert_close(first.weight, second.weight)


def test_the_shape_of_a_linear_may_be_anything() -> None:
    for out, width in ((1, 1), (1, 300), (300, 1), (2, 129), (2, 1100)):
        W = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
        H = torch.eye(width) + 0.1
        solution = SparseGPT().solve(W, Statistics(9, H.diagonal(), H), Unstructured(), 0.5)
        assert int((~solution.mask).sum()) == removed_count(W.numel(), 0.5)


def test_the_damped_loss_is_what_the_factor_says() -> None:
    """tr(ΔHΔᵀ) by the formula and by ‖ΔR‖², the identity the sweep rests on."""
    W, statistics = lifelike(10, 48)
    factor = SparseGPT().prepare(statistics)
    R = factor.RT_II.tril().T
    assert torch.equal(R.diagonal(), factor.diagonal_I)
    H = statistics.hessian + 0.01 * statistics.hessian.diagonal().mean() * torch.eye(48)
    torch.testing.assert_close(R @ R.T, H, rtol=1e-4, atol=1e-2)
    assert energy(W, H) == pytest.approx(float((W @ R).square().sum()), rel=1e-4)


def test_a_wide_hessian_is_factorised_in_panels() -> None:
    """Wider than eight panels, and no multiple of one."""
    _, statistics = lifelike(3, 1100)
    RT = SparseGPT().prepare(statistics).RT_II.double().tril()
    H = statistics.hessian.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(1100)
    assert (RT.T @ RT - H).abs().max() < 1e-5 * H.abs().max()
    narrow = Statistics(9, torch.ones(1100), torch.eye(1100))
    narrow.hessian[3, 900] = narrow.hessian[900, 3] = 1.05
    assert SparseGPT().prepare(narrow).damp == pytest.approx(0.1)
