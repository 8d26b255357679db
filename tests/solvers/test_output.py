"""What solvers make of G, what the model's output feels of a linear's errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tawny.calibration.output import OutputFactor
from tawny.errors import NumericalError
from tawny.patterns import NM, Unstructured
from tawny.solvers import MEMBER_SOLVERS, RIA, SOLVERS, Magnitude, SparseGPT, Wanda
from tawny.solvers.grid import Grid
from tawny.solvers.output import DAMP, damped
from tests.reference import masks
from tests.reference.output import lifelike_output
from tests.reference.problems import lifelike

MATRIX = Unstructured("matrix")
EQUAL_ROWS = [Unstructured("row"), NM(2, 4)]


def of_diagonal(diagonal: Tensor, tokens: int = 1 << 20) -> OutputFactor:
    return OutputFactor(tokens, diagonal)


@settings(deadline=None, max_examples=25)
@given(out=st.integers(1, 12), tokens=st.integers(1, 200), size=st.integers(-12, 6), seed=st.integers(0, 999))
def test_a_damped_factor_is_its_roots_around_a_diagonal_of_ones(out, tokens, size, seed):
    G = lifelike_output(out, tokens, seed, scale=10.0**size, blocks=1 + (out > 4))
    factor = damped(G)
    share = DAMP * (1 + out / tokens)
    assert factor.share == pytest.approx(share)
    W = torch.randn(out, 3, dtype=torch.float64)
    metric = torch.zeros(3, 3, dtype=torch.float64)
    for rows, Gn, G_RR in zip(factor.places, factor.blocks(), G.blocks, strict=True):
        assert torch.equal(Gn.diagonal(), torch.ones(len(Gn)))
        root = factor.root_O[rows].double()
        wanted = G_RR.double() / G.mean + share * torch.eye(len(Gn))
        assert torch.allclose(root[:, None] * Gn.double() * root, wanted, rtol=1e-4, atol=1e-5)
        metric += W[rows].T @ wanted @ W[rows]
    V = factor.through(W.float()).double()
    assert torch.allclose(V.T @ V, metric, rtol=1e-3, atol=1e-3)


def test_rows_that_nothing_feels_divide_nothing_and_few_tokens_make_rows_more_alike() -> None:
    diagonal = torch.tensor([0.0, 1.0, 3.0])
    few, many = (damped(of_diagonal(diagonal, tokens)).root_O for tokens in (2, 1 << 20))
    assert torch.isfinite(many).all() and float(many[0]) == pytest.approx(DAMP**0.5, rel=1e-4)
    assert few.max() / few.min() < many.max() / many.min()
    for nothing in (None, of_diagonal(torch.zeros(3)), of_diagonal(diagonal, tokens=0)):
        assert damped(nothing) is None
    with pytest.raises(NumericalError, match="NaN"):
        damped(of_diagonal(torch.tensor([1.0, torch.nan])))


@pytest.mark.parametrize("grid", [None, Grid(tuple(range(-8, 8)), 16)], ids=["plain", "grid"])
@pytest.mark.parametrize("strange", [False, True])
def test_sparsegpt_weighs_rows_as_if_they_were_scaled_before_and_back_after(strange: bool, grid: Any) -> None:
    W, statistics = lifelike(24, 96)
    if strange:  # inputs that never fire, and weights that are zero already
        for lines in (statistics.hessian, statistics.hessian.t()):
            lines[3:7] = 0
        W[::3, ::5] = 0
    G = of_diagonal(torch.rand(24).square() * 1e-6)
    G.diagonal[4] = 0
    root = damped(G).root_O[:, None]
    scaled = SparseGPT(group=32).solve(W * root, statistics, MATRIX, 0.6)
    found = SparseGPT(group=32).solve(W, statistics, MATRIX, 0.6, grid=grid, output=G)
    if grid is None:
        assert torch.equal(found.mask, scaled.mask)
        torch.testing.assert_close(found.weight, scaled.weight / root, rtol=1e-4, atol=1e-5)
    assert int(found.mask.sum()) == int(scaled.mask.sum())
    plain = SparseGPT(group=32).solve(W, statistics, MATRIX, 0.6, grid=grid)
    assert not torch.equal(found.mask, plain.mask)


@pytest.mark.parametrize("solver", [Wanda(), Magnitude(), RIA()], ids=str)
def test_scores_of_a_matrix_are_weighed_by_rows(solver: Any) -> None:
    W, statistics = lifelike(12, 40)
    G = of_diagonal(torch.rand(12).square())
    root = damped(G).root_O[:, None]
    size, norms = W.abs(), statistics.squared_norms.float().sqrt()
    scores = {
        Wanda: size * norms,
        Magnitude: size,
        RIA: (size / size.sum(0) + size / size.sum(1, keepdim=True)) * norms.sqrt(),
    }[type(solver)]
    found = solver.solve(W, statistics, MATRIX, 0.5, output=G)
    assert torch.equal(found.mask, masks.keep_matrix(scores * root, 240))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_factor_that_says_nothing_changes_no_bit(name: str) -> None:
    W, statistics = lifelike(12, 40)
    wanted = SOLVERS[name]().solve(W, statistics, MATRIX, 0.5)
    for diagonal, tokens in ((torch.zeros(12), 100), (torch.ones(12), 0)):
        blocks = (torch.diag(diagonal),)
        found = SOLVERS[name]().solve(
            W, statistics, MATRIX, 0.5, output=OutputFactor(tokens, diagonal, blocks)
        )
        assert torch.equal(found.weight, wanted.weight) and found.lost == wanted.lost


@pytest.mark.parametrize("pattern", EQUAL_ROWS, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_patterns_with_equal_rows_do_not_feel_rows(name: str, pattern: Any) -> None:
    W, statistics = lifelike(12, 40)
    G = of_diagonal(torch.rand(12).square())
    wanted = SOLVERS[name]().solve(W, statistics, pattern, 0.5)
    found = SOLVERS[name]().solve(W, statistics, pattern, 0.5, output=G)
    assert torch.equal(found.mask, wanted.mask)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-4, atol=1e-5)


def test_no_solver_defaults_to_more_than_it_can_use() -> None:
    order = ("none", "rows", "whole")
    for solver in (*SOLVERS.values(), *MEMBER_SOLVERS.values()):
        assert order.index(solver.default_output) <= order.index(solver.output)
