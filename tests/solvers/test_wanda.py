"""Wanda against its formula, and its official mode against what the authors' code does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.patterns import NM, Unstructured
from tawny.solvers import Wanda
from tests.reference import masks, official
from tests.reference.problems import lifelike


def test_the_lowest_scores_of_every_row_go_and_the_rest_stays_as_it_was() -> None:
    W, statistics = lifelike(7, 20)
    solution = Wanda().solve(W, statistics, Unstructured(), 0.6)
    scores = W.abs() * statistics.squared_norms.sqrt()
    assert torch.equal(solution.mask, masks.keep_rows(scores, [12] * 7))
    assert torch.equal(solution.weight, torch.where(solution.mask, W, 0))


def test_n_of_m_keeps_the_highest_scores_of_each_group() -> None:
    W, statistics = lifelike(7, 24)
    scores = W.abs() * statistics.squared_norms.sqrt()
    assert torch.equal(Wanda().solve(W, statistics, NM(3, 8), 0.625).mask, masks.keep_nm(scores, 3, 8))


def test_the_number_of_tokens_makes_no_difference() -> None:
    W, statistics = lifelike(7, 20)
    louder = Statistics(4 * statistics.tokens, 4 * statistics.squared_norms)
    assert torch.equal(
        Wanda().solve(W, statistics, Unstructured(), 0.6).mask,
        Wanda().solve(W, louder, Unstructured(), 0.6).mask,
    )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.floats(0, 1),
    st.sampled_from([1, 3, 10**6]),
    st.integers(0, 10**6),
)
def test_official_masks_are_reproduced_to_the_bit(out, width, sparsity, levels, seed):
    dice = torch.Generator().manual_seed(seed)
    W = torch.randint(-levels, levels + 1, (out, width), generator=dice) / levels  # few levels: many ties
    squared = torch.randint(0, levels + 1, (width,), generator=dice).float()
    solution = Wanda(compat="official").solve(W, Statistics(9, squared), Unstructured(), sparsity)
    expected = official.wanda_mask(W, squared, sparsity)
    assert torch.equal(solution.mask, expected)
    assert torch.equal(solution.weight, torch.where(expected, W, 0))


def test_official_floors_where_tawny_is_exact() -> None:
    W, statistics = lifelike(10, 33)
    exact = Wanda().solve(W, statistics, Unstructured(), 0.5)
    floored = Wanda(compat="official").solve(W, statistics, Unstructured(), 0.5)
    assert int((~exact.mask).sum()) == 165 and int((~floored.mask).sum()) == 160


def test_official_leaves_other_scopes_and_patterns_as_they_are() -> None:
    W, statistics = lifelike(10, 32)
    for pattern in (Unstructured("matrix"), NM(2, 4)):
        assert torch.equal(
            Wanda(compat="official").solve(W, statistics, pattern, 0.5).mask,
            Wanda().solve(W, statistics, pattern, 0.5).mask,
        )


def test_a_negative_squared_norm_is_an_error() -> None:
    with pytest.raises(NumericalError, match="negative"):
        Wanda().solve(torch.ones(2, 2), Statistics(1, torch.tensor([1.0, -1.0])), Unstructured(), 0.5)
