"""Magnitude pruning."""

from __future__ import annotations

import torch

from tawny.patterns import NM, Unstructured
from tawny.solvers import Magnitude
from tests.reference import masks
from tests.reference.problems import lifelike


def test_the_smallest_weights_of_the_matrix_go() -> None:
    W, _ = lifelike(9, 16)
    solution = Magnitude().solve(W, None, Unstructured(), 0.7)
    assert torch.equal(solution.mask, masks.keep_matrix(W.abs(), 101))
    assert torch.equal(solution.weight, torch.where(solution.mask, W, 0))


def test_rows_and_groups_are_chosen_on_their_own() -> None:
    W, _ = lifelike(9, 16)
    rows = Magnitude().solve(W, None, Unstructured("row"), 0.5)
    assert torch.equal(rows.mask, masks.keep_rows(W.abs(), [8] * 9))
    assert torch.equal(Magnitude().solve(W, None, NM(2, 4), 0.5).mask, masks.keep_nm(W.abs(), 2, 4))


def test_equal_magnitudes_do_not_make_it_remove_one_too_many() -> None:
    W = torch.ones(4, 8) * torch.tensor([1.0, -1.0]).repeat(4)
    solution = Magnitude().solve(W, None, Unstructured(), 0.5)
    assert int((~solution.mask).sum()) == 16
    assert solution.mask.flatten().tolist() == [False] * 16 + [True] * 16
