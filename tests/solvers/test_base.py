"""What every solver promises, and the measure they are compared by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.patterns import NM, Pattern, Unstructured, matches, removed_count
from tawny.solvers import RIA, Alps, Magnitude, SparseGPT, Wanda, energy, reconstruction_error
from tests.reference.problems import lifelike

SOLVERS = [Magnitude(), Wanda(), RIA(), SparseGPT(), SparseGPT(group=8), Alps()]
PATTERNS: list[Pattern] = [Unstructured(), Unstructured("row"), Unstructured("matrix"), NM(2, 4), NM(3, 8)]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def budget(W: torch.Tensor, pattern: Pattern, sparsity: float) -> int:
    if isinstance(pattern, NM):
        return W.numel() // pattern.m * (pattern.m - pattern.n)
    return removed_count(W.numel(), sparsity)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SOLVERS),
    st.sampled_from(PATTERNS),
    st.tuples(st.integers(1, 6), st.integers(1, 4)),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_every_solver_meets_its_budget_exactly(solver, pattern, size, sparsity, zero_share, dead, seed):
    out, width = size[0], 8 * size[1]
    W, statistics = lifelike(out, width, seed)
    dice = torch.Generator().manual_seed(seed)
    W[torch.rand(W.shape, generator=dice) < zero_share] = 0
    statistics.squared_norms[:dead] = 0
    statistics.hessian[:dead] = 0
    statistics.hessian[:, :dead] = 0
    before = (W.clone(), statistics.squared_norms.clone(), statistics.hessian.clone())

    solution = solver.solve(W, statistics, pattern, sparsity)

    gone = ~solution.mask
    removed, zeros = int(gone.sum()), W == 0
    assert removed == budget(W, pattern, sparsity)
    assert solution.weight.dtype == torch.float32 and solution.mask.dtype == torch.bool
    assert solution.weight.is_contiguous() and solution.mask.is_contiguous()
    assert not solution.weight[gone].any()
    assert not torch.signbit(solution.weight[gone]).any()  # no −0 for a packed format to stumble on
    if isinstance(pattern, NM):
        assert matches(solution.weight, pattern.n, pattern.m)
    elif pattern.scope == "row" or (pattern.scope is None and solver.default_scope == "row"):
        rows = gone.sum(1)
        assert int(rows.max() - rows.min()) <= 1
        # within a row zeros go first
        assert all(bool(g[z].all()) or not bool(g[~z].any()) for g, z in zip(gone, zeros, strict=True))
    else:
        assert bool(gone[zeros].all()) or not bool(gone[~zeros].any())
    assert not solution.weight[zeros].any()  # a zero never grows back
    assert torch.equal(W, before[0])
    assert torch.equal(statistics.squared_norms, before[1]) and torch.equal(statistics.hessian, before[2])


@each_solver
@each_pattern
def test_the_same_input_gives_the_same_bytes(solver: Any, pattern: Pattern) -> None:
    W, statistics = lifelike(12, 64)
    first, second = (solver.solve(W, statistics, pattern, 0.6) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.mask, second.mask)


@each_solver
@each_pattern
def test_what_linears_share_can_be_prepared_once(solver: Any, pattern: Pattern) -> None:
    W, statistics = lifelike(12, 64)
    prepared = solver.prepare(statistics)
    for scale in (1.0, 2.0):
        alone = solver.solve(W * scale, statistics, pattern, 0.6)
        shared = solver.solve(W * scale, statistics, pattern, 0.6, prepared)
        assert torch.equal(alone.weight, shared.weight) and torch.equal(alone.mask, shared.mask)
        assert alone.notes == shared.notes


@each_solver
def test_sparsity_zero_changes_nothing_and_one_leaves_nothing(solver: Any) -> None:
    W, statistics = lifelike(5, 16)
    dense = solver.solve(W, statistics, Unstructured(), 0.0)
    assert torch.equal(dense.weight, W) and bool(dense.mask.all()) and dense.weight is not W
    assert dense.weight.data_ptr() != W.data_ptr()
    empty = solver.solve(W, statistics, Unstructured(), 1.0)
    assert not empty.weight.any() and not empty.mask.any()


@each_solver
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_an_error(solver: Any, bad: float) -> None:
    W, statistics = lifelike(5, 16)
    W[2, 3] = bad
    with pytest.raises(NumericalError, match="1 of 80 numbers of the weight"):
        solver.solve(W, statistics, Unstructured(), 0.5)


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT(), Alps()], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite_are_an_error(solver: Any, bad: float) -> None:
    W, statistics = lifelike(5, 16)
    statistics.squared_norms[4] = bad
    statistics.hessian[4, 4] = bad
    with pytest.raises(NumericalError, match=r"1 of .* numbers of the input's"):
        solver.solve(W, statistics, Unstructured(), 0.5)


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT()], ids=str)
def test_a_linear_that_saw_no_token_loses_its_smallest_weights(solver: Any) -> None:
    W, _ = lifelike(6, 16)
    nothing = Statistics(0, torch.zeros(16), torch.zeros(16, 16))
    solution = solver.solve(W, nothing, Unstructured("row"), 0.5)
    assert torch.equal(solution.mask, Magnitude().solve(W, None, Unstructured("row"), 0.5).mask)
    assert torch.equal(solution.weight, W * solution.mask)


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT()], ids=str)
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_weights_of_inputs_that_never_fire_go_first(solver: Any, scope: Any) -> None:
    W, statistics = lifelike(8, 32)
    dead = torch.tensor([1, 8, 30])
    W[:, dead] *= 1000
    statistics.squared_norms[dead] = 0
    statistics.hessian[dead] = 0
    statistics.hessian[:, dead] = 0
    solution = solver.solve(W, statistics, Unstructured(scope), 0.3)
    assert not solution.mask[:, dead].any()


@pytest.mark.parametrize("solver", [Wanda(), SparseGPT(), Alps()], ids=str)
def test_a_solver_without_the_statistics_it_needs_says_so(solver: Any) -> None:
    with pytest.raises(ValueError, match="needs"):
        solver.solve(torch.ones(2, 2), None, Unstructured(), 0.5)


def test_the_more_a_solver_knows_the_smaller_its_error() -> None:
    W, statistics = lifelike(96, 128, tokens=600)
    for pattern, sparsity in ((Unstructured("row"), 0.6), (Unstructured("matrix"), 0.7), (NM(2, 4), 0.5)):
        errors = [
            reconstruction_error(W, solver.solve(W, statistics, pattern, sparsity).weight, statistics.hessian)
            for solver in (SparseGPT(), Wanda(), Magnitude())
        ]
        assert errors == sorted(errors) and errors[0] < errors[1] < 1


def test_the_reconstruction_error_is_the_share_of_the_output_that_is_lost() -> None:
    dice = torch.Generator().manual_seed(0)
    W, P = torch.randn(5, 9, generator=dice), torch.randn(5, 9, generator=dice)
    X = torch.randn(40, 9, generator=dice)
    lost, whole = (X @ (W - P).T).square().sum(), (X @ W.T).square().sum()
    assert reconstruction_error(W, P, X.T @ X) == pytest.approx(float(lost / whole), rel=1e-4)
    assert energy(W, X.T @ X) == pytest.approx(float(whole), rel=1e-4)
    assert reconstruction_error(W, W, X.T @ X) == 0
    assert reconstruction_error(W, P, torch.zeros(9, 9)) == 0
    assert reconstruction_error(torch.zeros(5, 9), P, X.T @ X) == float("inf")


@pytest.mark.parametrize("width", [9, 2048, 3000])
def test_an_energy_taken_by_panels_is_the_trace(width: int) -> None:
    W, statistics = lifelike(7, width, tokens=60)
    H = statistics.hessian
    whole = float(((W.double() @ H.double()) * W.double()).sum())
    assert energy(W, H) == pytest.approx(whole, rel=1e-5)
    held = W.bfloat16().float()
    whole = float(((held.double() @ H.double()) * held.double()).sum())
    assert energy(held, H, torch.bfloat16) == pytest.approx(whole, rel=5e-3)
    assert reconstruction_error(W, 0.5 * W, H, dtype=torch.bfloat16) == pytest.approx(0.25, rel=1e-4)
    assert reconstruction_error(held, held, H, lost=whole / 8, dtype=torch.bfloat16) == pytest.approx(
        0.125, rel=5e-3
    )
