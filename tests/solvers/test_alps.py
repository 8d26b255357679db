"""ALPS against its paper's iteration, against SparseGPT, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tawny import precision
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.kernels import native
from tawny.patterns import NM, Unstructured, keep_mask, removed_count
from tawny.solvers import SparseGPT, alps, reconstruction_error
from tawny.solvers import powers as inverses
from tawny.solvers.alps import Alps, _ByThreshold
from tawny.solvers.base import energy
from tawny.solvers.refit import refit
from tests.reference.alps import admm_mask
from tests.reference.problems import lifelike

PATTERNS = [Unstructured(), Unstructured("row"), NM(2, 4)]


@precision.force("float32")  # and an inverse for every penalty
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_it_finds_the_support_of_the_iteration_in_the_paper(sparsity: float) -> None:
    W, statistics = lifelike(32, 48)
    found = Alps().solve(W, statistics, Unstructured(), sparsity).mask
    wanted = admm_mask(W, statistics.hessian, removed_count(W.numel(), sparsity))
    # float32 against float64: a few weights at the threshold may differ
    assert int((found != wanted).sum()) <= 0.01 * int(wanted.sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_it_loses_less_than_sparsegpt_even_when_that_is_refitted(
    products: str, pattern, sparsity: float
) -> None:
    if isinstance(pattern, NM):
        sparsity = 0.5
    W, statistics = lifelike(64, 96)
    H = statistics.hessian
    mine = reconstruction_error(W, Alps().solve(W, statistics, pattern, sparsity).weight, H)
    other = SparseGPT().solve(W, statistics, pattern, sparsity)
    assert mine < 0.6 * reconstruction_error(W, other.weight, H)
    assert mine < reconstruction_error(W, refit(W, other.mask, H, start=other.weight)[0], H)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_loss_it_reports_is_the_loss(products: str, pattern) -> None:
    W, statistics = lifelike(24, 32)
    solution = Alps().solve(W, statistics, pattern, 0.5)
    assert solution.lost == pytest.approx(energy(W - solution.weight, statistics.hessian), rel=1e-3)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("rows", ["equal", "constant", "zeros"])
def test_fewer_survivors_than_equal_weights_are_no_obstacle(rows: str, kernel: bool, monkeypatch) -> None:
    if not kernel:
        monkeypatch.setattr(alps.admm, "changes", lambda *_: None)
    W, statistics = lifelike(128, 64)
    W = torch.full_like(W, 0.02) if rows == "constant" else W[:1].repeat(128, 1)
    if rows == "zeros":
        W[:, ::2] = 0
    H = statistics.hessian
    solution = Alps().solve(W, statistics, Unstructured(), 0.99)
    assert int((~solution.mask).sum()) == removed_count(W.numel(), 0.99)
    assert solution.lost == pytest.approx(energy(W - solution.weight, H), rel=1e-3)
    other = SparseGPT().solve(W, statistics, Unstructured(), 0.99)
    assert solution.lost < reconstruction_error(W, other.weight, H) * energy(W, H)


def test_more_zeros_than_the_budget_leave_the_weight_alone() -> None:
    W, statistics = lifelike(8, 16)
    W[:, ::2] = 0
    solution = Alps().solve(W, statistics, Unstructured(), 0.25)
    assert torch.equal(solution.weight, W) and int((~solution.mask).sum()) == 32


def test_hardly_any_tokens_and_dead_inputs_are_no_obstacle() -> None:
    W, statistics = lifelike(8, 24, tokens=3)
    H = statistics.hessian
    H[:, 5], H[5] = 0, 0
    solution = Alps().solve(W, statistics, Unstructured(), 0.5)
    assert torch.isfinite(solution.weight).all() and int(solution.mask.sum()) == 96
    silent = Statistics(0, torch.zeros(24), torch.zeros(24, 24))
    assert int(Alps().solve(W, silent, Unstructured(), 0.5).mask.sum()) == 96


def test_a_hessian_that_is_not_positive_gets_more_damping_and_the_note_says_so() -> None:
    W, statistics = lifelike(8, 16)
    statistics.hessian -= 0.02 * statistics.hessian.diagonal().mean() * torch.eye(16) * 8
    assert Alps().solve(W, statistics, Unstructured(), 0.5).notes["damp"] > 0.01
    statistics.hessian -= 1e6 * statistics.hessian.diagonal().mean() * torch.eye(16)
    with pytest.raises(NumericalError, match=r"damping|finite"):
        Alps().solve(W, statistics, Unstructured(), 0.5)


@pytest.mark.parametrize("rho", [1e-6, 1e6])
@pytest.mark.parametrize("damp", [1e-300, 1e6])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_options_at_the_ends_of_their_ranges_solve(pattern, damp: float, rho: float) -> None:
    W, statistics = lifelike(8, 16)
    solution = Alps(damp=damp, rho=rho).solve(W, statistics, pattern, 0.5)
    assert int(solution.mask.sum()) == W.numel() // 2 and torch.isfinite(solution.weight).all()


@pytest.mark.parametrize("zeros", [0.0, 0.2])
def test_the_threshold_near_the_last_one_is_the_threshold_over_everything(kernel, zeros: float) -> None:
    dice = torch.Generator().manual_seed(0)
    T = torch.randn(40, 50, generator=dice)
    zero = torch.rand(T.shape, generator=dice) < zeros if zeros else None
    support = _ByThreshold(Unstructured("matrix"), 1300, zero)
    support.choose(T)
    seen = torch.zeros(T.shape, dtype=torch.bool)
    for scale in (0.0, 1e-3, 1e-2, 3.0, 1e-3):
        wanted = (T + scale * torch.rand(T.shape, generator=dice)).round(decimals=2)  # many ties
        gone = (T - support.kept(T, slice(0, 40))) / 4
        support.begin(T)
        for top in range(0, 40, 7):
            rows = slice(top, min(top + 7, 40))
            step = torch.full_like(T[rows], 0.5)
            support.update(T[rows], wanted[rows] - gone[rows] - step, step, rows, 0.4, 0.1)
        assert torch.allclose(T, wanted, atol=1e-6)
        support.finish(T)
        scores = T.abs() if zero is None else T.abs().masked_fill(zero, -1.0)
        exact = float(scores.flatten().sort().values[1299])
        # the largest float of its bin
        assert exact <= support.threshold <= exact * (1 + 2**-14)
        kept = scores > support.threshold
        assert torch.equal(support.mask(T), keep_mask(scores, Unstructured("matrix"), 1300))
        assert torch.equal(support.kept(T, slice(0, 40)) != 0, kept)
        assert support.changes(T) == int((kept ^ seen).sum())
        assert support.changes(T) == 0
        seen = kept


@pytest.mark.parametrize("zeros", [False, True])
def test_every_kernel_solves_like_plain_torch(kernel, products: str, zeros: bool) -> None:
    W, statistics = lifelike(63, 97)
    if zeros:
        W[torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = 0
    found = Alps().solve(W, statistics, Unstructured(), 0.7)
    with native.force("torch"):
        wanted = Alps().solve(W, statistics, Unstructured(), 0.7)
    # The last bits differ, and with them a few weights at the threshold, which lose about as much as one another.
    assert int((found.mask != wanted.mask).sum()) <= 0.005 * W.numel()
    losses = [reconstruction_error(W, each.weight, statistics.hessian) for each in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    transposed = Alps().solve(W.T.contiguous().T, statistics, Unstructured(), 0.7)
    assert torch.equal(transposed.mask, found.mask)


@pytest.mark.parametrize("a", [0.01, 0.3, 1.0, 2.5])
def test_the_polynomial_of_an_inverse_is_within_its_bound(a: float) -> None:
    shares = np.polynomial.Polynomial(inverses._nearest(a))
    x = np.linspace(0, a, 1001)
    bound = 1 / np.polynomial.Chebyshev.basis(inverses._DEGREE + 1)(1 + 2 / a)
    assert bound < 0.018
    assert np.abs(1 - (1 + x) * shares(x)).max() == pytest.approx(bound, rel=1e-6, abs=1e-12)


@precision.force("bfloat16")
@pytest.mark.parametrize("powers", [4, 2])
@pytest.mark.parametrize("grown", [0.04, 0.2, 1.0, 1.1, 1.9, 3.4, 3.5, 13.0])
def test_one_inverse_serves_all_penalties_near_it(grown: float, powers: int, monkeypatch) -> None:
    if powers == 2:  # as if it were too large for more
        monkeypatch.setattr(inverses, "_AT_WORK", 0)
    _, statistics = lifelike(20, 48)
    scaled = Alps(rho=0.2).prepare(statistics)
    found = scaled.inverse(0.2 * grown).double()
    H = scaled.hessian_II.double() + scaled.ridge * torch.eye(48)
    H = H / scaled.scale_I.double() / scaled.scale_I.double()[:, None]
    values, vectors = torch.linalg.eigh(H)
    wanted = 1 / (values + 0.2 * grown)
    off = vectors.T @ found @ vectors - torch.diag(wanted)
    # bfloat16 rounds every entry by up to its 2⁻⁹th part
    assert float(torch.linalg.matrix_norm(off, 2)) <= (0.018 + 2**-7) * float(wanted.max())
    assert len(scaled.made) <= 2
    assert max(len(made) for made in scaled.made.values()) in (1, powers)


@precision.force("float32")
@pytest.mark.parametrize("rows", [3, 70, 140, 141, 400])
def test_a_factor_multiplies_like_an_inverse(rows: int) -> None:
    _, statistics = lifelike(20, 280)
    scaled = Alps().prepare(statistics)
    right = torch.randn(rows, 280, generator=torch.Generator().manual_seed(rows))
    found = torch.empty_like(right)
    scaled.times_inverse(0.3, rows)(right, found)
    H = scaled.hessian_II.double() + scaled.ridge * torch.eye(280)
    H = H / scaled.scale_I.double() / scaled.scale_I.double()[:, None] + 0.3 * torch.eye(280)
    wanted = torch.linalg.solve(H, right.double().T).T
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-5
    assert {by for by, _ in scaled.made} == (
        {"factor"} if inverses.wide(rows, 280) else {"factor", "inverse"}
    )


def test_few_inverses_and_bfloat16_lose_no_more(monkeypatch) -> None:
    for rows, columns in ((96, 192), (160, 64)):
        W, statistics = lifelike(rows, columns)
        losses = []
        for products, kept in (("float32", 1 << 28), ("bfloat16", 1 << 28), ("bfloat16", 0)):
            monkeypatch.setattr(inverses, "_AT_WORK", kept)
            with precision.force(products):
                solution = Alps().solve(W, statistics, Unstructured(), 0.6)
            losses.append(reconstruction_error(W, solution.weight, statistics.hessian))
        assert len(set(losses)) == 3
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.01)


def test_inverses_that_were_dropped_are_made_again_as_they_were(products: str, monkeypatch) -> None:
    W, statistics = lifelike(24, 40)
    solutions, dtype = [], precision.native_dtype()
    one = (1 if dtype is torch.float32 else inverses._DEGREE + 1) * 40 * 40 * dtype.itemsize
    for kept in (1 << 28, one):
        monkeypatch.setattr(inverses, "_KEPT", kept)
        prepared = Alps().prepare(statistics)
        solutions += [Alps().solve(weight, statistics, Unstructured(), 0.6, prepared) for weight in (W, W)]
        assert (len(prepared.made) > 1) == (kept > one)
    assert all(torch.equal(solutions[0].weight, other.weight) for other in solutions[1:])


@pytest.mark.parametrize("shape", [(24, 16), (4, 32)])
def test_chunks_of_any_size_give_the_same_support(shape, monkeypatch) -> None:
    W, statistics = lifelike(*shape)
    whole = Alps().solve(W, statistics, Unstructured(), 0.6)
    for module in (alps, inverses):
        monkeypatch.setattr(module, "CHUNK", 5 * shape[1])
        monkeypatch.setattr(module, "ROWS", 1)
        monkeypatch.setattr(module, "CACHED", 2 * shape[1])
    parts = Alps().solve(W, statistics, Unstructured(), 0.6)
    assert torch.equal(whole.mask, parts.mask)
    assert torch.allclose(whole.weight, parts.weight, atol=1e-5)
