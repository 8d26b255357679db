"""Grids: scales and rounding against their slow twin, and what every solver promises of an answer on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.errors import RecipeError
from tawny.patterns import NM, Unstructured, removed_count
from tawny.solvers import RIA, Alps, Grid, Magnitude, SparseGPT, Wanda, energy, reconstruction_error
from tawny.solvers.base import Solution
from tawny.solvers.grid import ACCIDENTS, ScaledGrid
from tests.reference import grid as twin
from tests.reference.alps import admm_rounded
from tests.reference.problems import lifelike
from tests.reference.sparsegpt import sparsegpt

TABLES = [
    (-50, -31, -16, -3, 10, 22, 38, 63),
    tuple(range(-8, 8)),
    (-3, -1, 1, 3),
    tuple(range(-127, 128)),
    (0, 1),
]
SOLVERS = [Magnitude(), Wanda(), RIA(), SparseGPT(), SparseGPT(group=8), Alps()]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)


def assert_on_grid(solution: Solution, grid: Grid, like: torch.Tensor) -> None:
    """Exactly scale · level where kept, by scales of the grid's bits, and +0 elsewhere."""
    weight, scales = solution.weight, solution.state
    size = min(grid.group or like.shape[1], like.shape[1])
    assert scales is not None and scales.shape == (len(like), -(-like.shape[1] // size))
    assert weight.dtype == scales.dtype == torch.float32 and weight.is_contiguous()
    assert torch.equal(grid.held(scales), scales) and bool(torch.isfinite(scales).all())
    wide = scales.repeat_interleave(size, 1)[:, : like.shape[1]]
    values = wide[..., None] * torch.tensor(grid.levels)
    assert bool((weight[..., None] == values).any(-1)[solution.mask].all())
    assert not weight[~solution.mask].any() and not torch.signbit(weight[weight == 0]).any()


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(TABLES),
    st.integers(1, 5),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 50)),
    st.floats(0, 0.9),
    st.integers(0, 10**6),
)
def test_scales_and_rounding_are_those_of_the_twin(levels, out, width, group, gone, seed) -> None:
    dice = torch.Generator().manual_seed(seed)
    W, weights = torch.randn(out, width, generator=dice), torch.rand(width, generator=dice)
    keep = torch.rand(out, width, generator=dice) >= gone
    grid, size = ScaledGrid(levels, group), min(group or width, width)
    scales = grid.fit(W, weights, keep)
    wanted = twin.scales(W, weights * keep, levels, size, 24 - grid.lost)

    def lost(s: torch.Tensor) -> float:
        return float(((W - twin.rounded(W, s, keep, levels, size)).square() * weights * keep).sum())

    whole = float((W.square() * weights * keep).sum())
    assert lost(scales) == pytest.approx(lost(wanted), rel=1e-2, abs=2**-16 * whole + 1e-30)
    assert torch.equal(grid.project(W, scales, keep), twin.rounded(W, scales, keep, levels, size))
    solution = Solution(grid.project(W, scales, keep), keep, state=scales)
    assert_on_grid(solution, grid, W)
    moved, refitted = grid.refit(W, scales, weights, keep)
    assert_on_grid(Solution(moved, keep, state=refitted), grid, W)


def test_a_level_is_the_nearest_and_of_two_the_upper_one() -> None:
    for levels in TABLES:
        X = torch.arange(-300, 300) / 4
        assert ScaledGrid(levels).nearest(X).tolist() == [twin.nearest(x, levels) for x in X.tolist()]


def test_levels_that_do_not_ascend_are_an_error() -> None:
    for levels in ((), (3,), (1, 1), (2, 1)):
        with pytest.raises(ValueError, match="ascend"):
            ScaledGrid(levels)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SOLVERS),
    st.sampled_from([Unstructured(), Unstructured("row"), NM(2, 4), NM(3, 8)]),
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    st.sampled_from([8, 16, 24, None]),
    st.floats(0, 1),
    st.sampled_from([0, 0.005, 0.3, 1.0]),
    st.integers(0, 3),
    st.integers(0, 10**6),
)
def test_every_solver_answers_on_the_grid(solver, pattern, size, group, sparsity, zero_share, dead, seed):
    W, statistics = lifelike(size[0], 8 * size[1], seed)
    W[torch.rand(W.shape, generator=torch.Generator().manual_seed(seed)) < zero_share] = 0
    statistics.squared_norms[:dead] = 0
    statistics.hessian[:dead] = 0
    statistics.hessian[:, :dead] = 0
    before, seen, grid = (
        W.clone(),
        statistics.squared_norms.clone(),
        ScaledGrid(TABLES[seed % len(TABLES)], group),
    )

    solution = solver.solve(W, statistics, pattern, sparsity, grid=grid)

    assert_on_grid(solution, grid, W)
    assert torch.equal(W, before) and torch.equal(statistics.squared_norms, seen)
    zeros, gone = int((W == 0).sum()), int((~solution.mask).sum())
    budget = removed_count(W.numel(), sparsity)
    if isinstance(pattern, NM):
        budget = W.numel() // pattern.m * (pattern.m - pattern.n)
    assert budget <= gone <= budget + zeros and (zeros or gone == budget)
    # A weight that was pruned before stays so; a few that were kept are accidents.
    assert int(solution.mask[W == 0].sum()) <= ACCIDENTS * W.numel()


@each_solver
def test_the_same_input_gives_the_same_bytes(solver: Any) -> None:
    W, statistics = lifelike(12, 64)
    grid, shared = ScaledGrid(TABLES[0], 16), solver.prepare(statistics)
    first = solver.solve(W, statistics, Unstructured(), 0.5, grid=grid)
    second = solver.solve(W, statistics, Unstructured(), 0.5, shared, grid)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.state, second.state)


def test_more_levels_lose_less_and_so_does_a_solver_that_knows_more() -> None:
    W, statistics = lifelike(96, 128, tokens=600)
    for sparsity in (0.0, 0.5):
        by_solver = []
        for solver in (Alps(), SparseGPT(), Wanda()):
            few, more = (
                reconstruction_error(
                    W,
                    solver.solve(W, statistics, Unstructured(), sparsity, grid=ScaledGrid(levels, 32)).weight,
                    statistics.hessian,
                )
                for levels in (TABLES[0], tuple(range(-64, 64)))
            )
            assert more < few
            by_solver.append(few)
        assert by_solver == sorted(by_solver) and by_solver[0] < 0.9 * by_solver[1]


@pytest.mark.parametrize("solver", [SparseGPT(), Alps()], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_loss_it_reports_is_the_loss(solver: Any, sparsity: float) -> None:
    W, statistics = lifelike(24, 64)
    solution = solver.solve(W, statistics, Unstructured(), sparsity, grid=ScaledGrid(TABLES[0], 16))
    assert solution.lost == pytest.approx(energy(W - solution.weight, statistics.hessian), rel=2e-3)


@pytest.mark.parametrize("removed", [0, 700])
def test_the_column_loop_rounds_as_its_papers_do(removed: int) -> None:
    W, statistics = lifelike(24, 60)
    grid = ScaledGrid(TABLES[0], 16)
    mine = SparseGPT().solve(W, statistics, Unstructured(), removed / W.numel(), grid=grid)
    weight, mask = sparsegpt(W, statistics.hessian, removed=removed, group=16, levels=grid.levels)
    # A value in the middle between two levels goes either way, and takes what follows with it.
    assert float((mine.mask == mask).double().mean()) > 0.97
    theirs = energy(W - weight.float(), statistics.hessian)
    assert mine.lost == pytest.approx(theirs, rel=0.05)
    assert float((mine.weight == weight).double().mean()) > 0.8


@pytest.mark.parametrize("masked", [False, True])
def test_the_iteration_rounds_as_it_is_written(masked: bool) -> None:
    W, statistics = lifelike(32, 48)
    grid = ScaledGrid(TABLES[0], 16)
    sparse = Alps().solve(W, statistics, Unstructured(), 0.5 * masked)
    mine = Alps().solve(W, statistics, Unstructured(), 0.5 * masked, grid=grid)
    assert torch.equal(mine.mask, sparse.mask)
    weight = admm_rounded(W, sparse.weight, sparse.mask, statistics.hessian, grid.levels, 16)
    theirs = energy(W - weight.float(), statistics.hessian)
    assert mine.lost == pytest.approx(theirs, rel=0.05)


@each_solver
def test_weights_of_inputs_that_never_fire_have_values_too(solver: Any) -> None:
    W, statistics = lifelike(12, 32)
    statistics.squared_norms[:16] = 0
    statistics.hessian[:16] = 0
    statistics.hessian[:, :16] = 0
    solution = solver.solve(W, statistics, Unstructured(), 0.0, grid=ScaledGrid(TABLES[0], 16))
    assert bool(solution.mask.all()) and float((W - solution.weight).norm() / W.norm()) < 0.5


@pytest.mark.parametrize("nm", [(2, 12), (3, 6), (5, 24)])
def test_a_scale_a_row_goes_with_any_m(nm: tuple[int, int]) -> None:
    W, statistics = lifelike(4, 24)
    solution = SparseGPT(group=16).solve(W, statistics, NM(*nm), 0.5, grid=ScaledGrid(TABLES[3]))
    assert bool((solution.mask.view(4, -1, nm[1]).sum(2) == nm[0]).all())


def test_an_m_that_does_not_divide_the_columns_of_a_scale_is_an_error() -> None:
    W, statistics = lifelike(4, 24)
    with pytest.raises(RecipeError, match="pattern is 2:12; expected an m that divides 8"):
        SparseGPT().solve(W, statistics, NM(2, 12), 0.5, grid=ScaledGrid(TABLES[0], 8))
