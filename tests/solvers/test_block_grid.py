from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from tawny.errors import UserError
from tawny.gguf_kinds import GGUF_KINDS, GGUFKind, fitting
from tawny.kinds import kind_of, solved_kind
from tawny.patterns import NM, Unstructured
from tawny.solvers import block_grid
from tawny.solvers.alps import Alps
from tawny.solvers.base import Solution, on_grid, reconstruction_error
from tawny.solvers.block_grid import BlockGrid, grid_of
from tawny.solvers.sparsegpt import SparseGPT
from tests.reference.problems import lifelike

EVERY = pytest.mark.parametrize("kind", GGUF_KINDS.values(), ids=GGUF_KINDS)


def decoded(rows: Tensor, kind: GGUFKind) -> Tensor:
    """What the `gguf` package reads."""
    return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind.type]).copy())


def random_state(kind: GGUFKind, rows: int, width: int) -> Tensor:
    blocks, n = width // kind.block, kind.block // kind.group

    def halves() -> Tensor:
        return torch.randn(rows, blocks, 1).half().float().expand(-1, -1, n).reshape(rows, -1)

    def steps(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (rows, blocks * n)).float()

    s = steps(*kind.scales) if kind.scales else torch.ones(rows, blocks * n)
    m = steps(0, kind.minima) if kind.minima > 1 else torch.full_like(s, kind.minima)
    return torch.stack([halves(), s, halves() if kind.minima else torch.zeros_like(s), m], -1)


@EVERY
def test_what_is_encoded_is_what_gguf_reads(kind):
    torch.manual_seed(0)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.type]] == (kind.block, kind.bytes)
    codes = torch.randint(0, len(kind.levels), (5, 512), dtype=torch.uint8)
    state = random_state(kind, 5, 512)
    d, s, dmin, m = state.repeat_interleave(kind.group, 1).unbind(-1)
    wanted = d * s * torch.tensor(kind.levels, dtype=torch.float32)[codes.long()] - dmin * m
    assert torch.equal(decoded(kind.encode(codes, state), kind), wanted)


@EVERY
@pytest.mark.parametrize("size", [1e-7, 1e-2, 1e3])
def test_a_fit_can_be_written_and_is_near(kind, size):
    torch.manual_seed(1)
    W = torch.randn(7, 512) * size * torch.randn(7, 512).mul(0.5).exp()
    weights, grid = torch.rand(512) + 0.1, BlockGrid(kind)
    state = grid.fit(W, weights)
    made = grid.project(W, state)
    assert torch.equal(decoded(grid.encoded(made, state), kind), made)
    assert torch.equal(grid.project(made, state), made)
    refitted, moved = grid.refit(W, state, weights, None)
    assert torch.equal(decoded(grid.encoded(refitted, moved), kind), refitted)

    def lost(values: Tensor) -> float:
        return float(((W - values).square() * weights).sum() / (W.square() * weights).sum())

    assert lost(refitted) <= 1.02 * lost(made) + 1e-9
    if size == 1e-2:
        assert lost(made) < 12 * 4**-kind.bits
        if kind.name in ("q4_0", "q4_1", "q5_0", "q5_1"):
            numpy = W.numpy()
            theirs = gguf.quantize(numpy, gguf.GGMLQuantizationType[kind.type])
            assert lost(made) < lost(decoded(torch.from_numpy(theirs), kind))


@EVERY
def test_each_value_is_the_nearest_of_its_group(kind):
    """A slow twin: every level of every weight is tried."""
    torch.manual_seed(2)
    W, grid = torch.randn(3, 256), BlockGrid(kind)
    state = grid.fit(W)
    d, s, dmin, m = state.repeat_interleave(kind.group, 1).unbind(-1)
    every = d[..., None] * s[..., None] * torch.tensor(kind.levels) - (dmin * m)[..., None]
    nearest = (every - W[..., None]).abs().amin(-1)
    assert torch.allclose((grid.project(W, state) - W).abs(), nearest, atol=1e-6)
    for group in range(0, 256 // kind.group, 3):
        columns = slice(group * kind.group, (group + 1) * kind.group)
        rounded = grid.rounding(state[:, group])(W[:, columns].t().contiguous()).t()
        assert torch.equal(rounded, grid.project(W, state)[:, columns])


@EVERY
def test_dead_and_odd_groups_are_finite(kind):
    W = torch.zeros(6, 256)
    W[1], W[2, :3], W[3], W[4, 5], W[5] = 0.5, 1.0, -0.25, 1e5, torch.linspace(1, 2, 256)
    grid = BlockGrid(kind)
    state = grid.fit(W)
    made = grid.project(W, state)
    assert made.isfinite().all() and not made[0].any()
    assert torch.equal(decoded(grid.encoded(made, state), kind), made)


@EVERY
@pytest.mark.parametrize("solver", [SparseGPT(), Alps()], ids=["sparsegpt", "alps"])
def test_solvers_lose_less_than_rounding(kind, solver):
    W, statistics = lifelike(32, 512)
    grid, keep = BlockGrid(kind), torch.ones(32, 512, dtype=torch.bool)
    solution = solver.solve(W, statistics, Unstructured(), 0.0, grid=grid)
    rounded = on_grid(Solution(W, keep), grid, statistics).weight
    assert torch.equal(decoded(grid.encoded(solution.weight, solution.state), kind), solution.weight)
    lost, by_rounding = (
        reconstruction_error(W, each, statistics.hessian) for each in (solution.weight, rounded)
    )
    assert lost < 0.7 * by_rounding


@pytest.mark.parametrize("kind", [k for k in GGUF_KINDS.values() if k.zero], ids=lambda kind: kind.name)
def test_zeros_stay_where_a_type_holds_them(kind):
    W, statistics = lifelike(16, 512)
    for solver, pattern in ((SparseGPT(), NM(2, 4)), (SparseGPT(), Unstructured()), (Alps(), Unstructured())):
        grid = BlockGrid(kind)
        solution = solver.solve(W, statistics, pattern, 0.5, grid=grid)
        assert int((~solution.mask).sum()) == W.numel() // 2
        assert not solution.weight[~solution.mask].any()
        assert torch.equal(decoded(grid.encoded(solution.weight, solution.state), kind), solution.weight)


def test_a_width_gets_the_type_that_takes_it():
    assert fitting("q4_k", 512) == "q4_k" and fitting("q4_k", 576) == "q5_0" and fitting("q4_0", 48) == ""
    assert all(fitting(name, 32) and fitting(name, 256) == name for name in GGUF_KINDS)


def test_names_are_told_apart():
    assert isinstance(grid_of("q4_k"), BlockGrid) and solved_kind("q4_k").bits == 4.5
    with pytest.raises(UserError, match="q4_k is a type of GGUF files, which no packed folder holds"):
        kind_of("q4_k")
    with pytest.raises(UserError, match="group 32 goes with int8 to int2 values"):
        solved_kind("q4_k", 32)


def test_threads_that_share_the_rows_round_them_alike(monkeypatch):
    torch.manual_seed(0)
    W, weights, before = torch.randn(40, 256).bfloat16(), torch.rand(256), torch.get_num_threads()
    wanted = block_grid.rounded(W, "q4_k", weights)
    monkeypatch.setattr(block_grid, "_ROWS", 8)
    try:
        torch.set_num_threads(3)
        values, rows = block_grid.rounded(W, "q4_k", weights)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values, wanted[0]) and torch.equal(rows, wanted[1])
