"""Masks are exact in count, deterministic in ties, and the same as the obvious ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.errors import PatternError
from tawny.patterns import (
    NM,
    Unstructured,
    check_pattern,
    keep_mask,
    keep_mask_rows,
    matches,
    parse_pattern,
    removed_count,
    rows_removed,
    zeros_first,
)
from tests.reference import masks

quick = settings(deadline=None, max_examples=40)


@st.composite
def scores(draw: st.DrawFn, width_of: int = 1) -> torch.Tensor:
    """Small matrices in which equal scores, zeros and −∞ are common."""
    out = draw(st.integers(1, 7))
    width = draw(st.integers(1, 8)) * width_of
    few = draw(st.sampled_from([1, 2, 5, 1000]))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(0, few, (out, width), generator=dice).float()
    return values.masked_fill(torch.rand(out, width, generator=dice) < 0.1, -torch.inf)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("Unstructured-Row", Unstructured("row")),
        ("row", Unstructured("row")),
        ("matrix", Unstructured("matrix")),
        ("2:4", NM(2, 4)),
        (" 3 : 8 ", NM(3, 8)),
        ("4:4", NM(4, 4)),
    ],
)
def test_a_pattern_is_read_from_its_text_and_back(text: str, pattern: object) -> None:
    assert parse_pattern(text) == pattern == parse_pattern(str(pattern))


@pytest.mark.parametrize("text", ["", "rows", "2:", "4:2", "0:4", "1:1", "2:4:8", "124", "-1:4", "2.5:4"])
def test_a_pattern_that_is_none_is_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(PatternError, match="expected"):
        parse_pattern(text)


def test_widths_that_m_does_not_divide_are_refused_by_name_and_shape_five_at_a_time() -> None:
    shapes = {"q": (4, 8), "down": (4, 10)}
    with pytest.raises(PatternError, match=r"2:4.*down \[4, 10\]"):
        check_pattern(NM(2, 4), shapes)
    check_pattern(NM(1, 2), shapes)
    check_pattern(Unstructured(), shapes)
    with pytest.raises(PatternError, match=r"w4.* and 3 more"):
        check_pattern(NM(2, 4), {f"w{i}": (2, 6) for i in range(8)})


@quick
@given(st.integers(0, 10**9), st.floats(0, 1))
def test_the_count_is_within_half_a_weight_and_within_bounds(numel: int, sparsity: float) -> None:
    count = removed_count(numel, sparsity)
    assert 0 <= count <= numel and abs(count - sparsity * numel) <= 0.5


def test_a_count_is_rounded_half_to_even() -> None:
    assert [removed_count(size, 0.5) for size in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert removed_count(10, 1.5) == 10 and removed_count(10, -1) == 0


@quick
@given(st.integers(1, 50), st.data())
def test_rows_share_a_count_to_within_one(rows: int, data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, 20 * rows))
    shares = rows_removed(rows, removed)
    assert int(shares.sum()) == removed and int(shares.max() - shares.min()) <= 1


@quick
@given(scores(), st.data())
def test_the_mask_of_a_matrix_or_of_rows_is_the_obvious_one(S: torch.Tensor, data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, S.numel()))
    kept = keep_mask(S, Unstructured("matrix"), removed)
    assert torch.equal(kept, masks.keep_matrix(S, removed))
    assert torch.equal(kept, keep_mask(S, Unstructured(), removed))
    by_row = masks.keep_rows(S, rows_removed(len(S), removed).tolist())
    assert torch.equal(keep_mask(S, Unstructured("row"), removed), by_row)
    counts = [data.draw(st.integers(0, S.shape[1])) for _ in S]
    assert torch.equal(keep_mask_rows(S, torch.tensor(counts)), masks.keep_rows(S, counts))


@quick
@given(st.sampled_from([(1, 2), (2, 4), (3, 8), (1, 4), (8, 8), (5, 20)]), st.data())
def test_the_mask_of_n_of_m_is_the_obvious_one(nm: tuple[int, int], data: st.DataObject) -> None:
    S = data.draw(scores(width_of=nm[1]))
    kept = keep_mask(S, NM(*nm), 0)
    assert torch.equal(kept, masks.keep_nm(S, *nm))
    assert matches(torch.where(kept, 1.0, 0.0), *nm)


@pytest.mark.parametrize("ties", [False, True])
def test_many_groups_of_m_take_another_way_to_the_same_mask(ties: bool) -> None:
    S = torch.randn(700, 24, generator=torch.Generator().manual_seed(1))
    S = S.round() if ties else S
    for n, m in ((2, 4), (3, 8), (1, 3)):
        assert torch.equal(keep_mask(S, NM(n, m), 0), masks.keep_nm(S, n, m))


@pytest.mark.parametrize(
    "shape", ["continuous", "many ties", "constant", "zeros first", "periodic", "sorted"]
)
@pytest.mark.parametrize("share", [0.0001, 0.3, 0.5, 0.97])
def test_a_long_matrix_takes_another_way_to_the_same_mask(shape: str, share: float) -> None:
    S = torch.rand(300, 1024, generator=torch.Generator().manual_seed(2))
    if shape == "many ties":
        S = (S * 8).round()
    elif shape == "constant":
        S = torch.ones_like(S)
    elif shape == "zeros first":
        S[S < 0.4] = -torch.inf
    elif shape == "periodic":  # the sample sees one kind of value only
        S.view(-1)[:: (S.numel() // 4096) | 1] += 10
    elif shape == "sorted":
        S = S.view(-1).sort().values.view(S.shape)
    removed = removed_count(S.numel(), share)
    order = S.view(-1).sort(stable=True).indices
    expected = torch.ones(S.numel(), dtype=torch.bool)
    expected[order[:removed]] = False
    assert torch.equal(keep_mask(S, Unstructured("matrix"), removed).view(-1), expected)


def test_long_rows_are_chosen_in_chunks_and_still_exact() -> None:
    S = (torch.rand(37, 9000, generator=torch.Generator().manual_seed(3)) * 50).round()
    removed = 200_001
    order = S.sort(dim=1, stable=True).indices
    expected = torch.ones(S.shape, dtype=torch.bool)
    for row, count in enumerate(rows_removed(37, removed).tolist()):
        expected[row, order[row, :count]] = False
    assert torch.equal(keep_mask(S, Unstructured("row"), removed), expected)


def test_choosing_a_mask_leaves_the_scores_alone() -> None:
    S = torch.rand(300, 1024)
    before = S.clone()
    for pattern in (Unstructured("row"), Unstructured("matrix"), NM(2, 4), NM(7, 32)):
        keep_mask(S, pattern, 1000)
    assert torch.equal(S, before)


def test_a_count_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot remove 5 of 4"):
        keep_mask(torch.ones(2, 2), Unstructured(), 5)


def test_zeros_go_before_any_score() -> None:
    S = zeros_first(torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[1.0, 0.0, -0.0]]))
    assert keep_mask(S, Unstructured(), 2).tolist() == [[True, False, False]]


def test_matches_counts_what_is_not_zero() -> None:
    W = torch.tensor([[1.0, 0, 0, 2.0], [0, 0, 0, -0.0]])
    assert matches(W, 2, 4) and matches(W, 1, 2) and not matches(W, 1, 4)
    assert not matches(W, 2, 3)  # 3 does not divide the width
    assert not matches(torch.full((1, 4), torch.nan), 2, 4)
