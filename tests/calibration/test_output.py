"""The factor G: sums over chunks against one product, blocks of the diagonal, and what it says of a change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tawny.calibration import output
from tawny.calibration.output import OutputAccumulator, OutputFactor, diagonal_blocks


@given(out=st.integers(1, 5000), most=st.integers(1, 3000))
def test_blocks_of_the_diagonal_hold_every_row_once(out: int, most: int) -> None:
    blocks = diagonal_blocks(out, most)
    sizes = [rows.stop - rows.start for rows in blocks]
    assert [row for rows in blocks for row in range(rows.start, rows.stop)] == list(range(out))
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_add_up_to_the_mean_of_all_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.diagonal_blocks, "__defaults__", (4,))
    g_TO = torch.randn(37, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = OutputAccumulator(9, "whole")
    for chunk in g_TO.split(10):
        whole.add(chunk)
    factor = whole.finish()
    G_OO = g_TO.double().T @ g_TO.double() / 37
    torch.testing.assert_close(factor.diagonal.double(), G_OO.diagonal(), rtol=1e-5, atol=1e-6)
    for rows, G_RR in zip(diagonal_blocks(9), factor.blocks, strict=True):
        torch.testing.assert_close(G_RR.double(), G_OO[rows, rows], rtol=1e-4, atol=1e-5)
    assert factor.tokens == 37


def test_what_is_felt_is_half_the_squared_directional_change() -> None:
    random = torch.Generator().manual_seed(1)
    x_TI, g_TO = torch.randn(50, 6, generator=random), torch.randn(50, 5, generator=random)
    D_OI = torch.randn(5, 6, generator=random)
    accumulator = OutputAccumulator(5, "whole")
    accumulator.add(g_TO)
    factor = accumulator.finish()
    felt = factor.felt(D_OI, x_TI.T @ x_TI, 50)
    pairs = torch.einsum("to,oi,si->ts", g_TO, D_OI, x_TI).square().mean()
    assert felt == pytest.approx(0.5 * float(pairs), rel=1e-4)
    rows = OutputFactor(factor.tokens, factor.diagonal).felt(D_OI, x_TI.T @ x_TI, 50)
    expected = 0.5 * float((factor.diagonal * (D_OI @ (x_TI.T @ x_TI / 50) @ D_OI.T).diagonal()).sum())
    assert rows == pytest.approx(expected, rel=1e-4)


def test_nothing_seen_feels_nothing() -> None:
    factor = OutputAccumulator(3, "whole").finish()
    assert factor.tokens == 0 and factor.mean == 0 and factor.felt(torch.ones(3, 2), torch.eye(2), 0) == 0
