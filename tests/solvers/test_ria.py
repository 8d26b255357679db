"""RIA's scores and masks."""

from __future__ import annotations

import pytest
import torch

from tawny.calibration.statistics import Statistics
from tawny.patterns import NM, Unstructured
from tawny.solvers import Wanda
from tawny.solvers.ria import RIA
from tests.reference.problems import lifelike
from tests.reference.ria import ria_scores


@pytest.mark.parametrize("a", [0.5, 0.0, 1.0])
def test_the_weights_with_the_lowest_scores_of_the_matrix_go(a: float) -> None:
    W, statistics = lifelike(9, 16)
    solution = RIA(a=a).solve(W, statistics, Unstructured(), 0.5)
    scores = torch.tensor(ria_scores(W, statistics.squared_norms, a))
    assert int(solution.mask.sum()) == 72
    assert scores[solution.mask].min() >= scores[~solution.mask].max()
    assert torch.equal(solution.weight, W * solution.mask)


def test_no_output_loses_all_its_weights_because_they_are_small() -> None:
    W, statistics = lifelike(8, 32)
    W[5] *= 1e-4
    assert not Wanda().solve(W, statistics, Unstructured("matrix"), 0.5).mask[5].any()
    assert RIA().solve(W, statistics, Unstructured(), 0.5).mask[5].any()


def test_zeros_go_first_and_rows_and_columns_of_zeros_are_no_trouble() -> None:
    W, statistics = lifelike(8, 16)
    W[2], W[:, 3] = 0, 0
    solution = RIA().solve(W, statistics, Unstructured(), 0.5)
    assert int((~solution.mask).sum()) == 64
    assert not solution.mask[2].any() and not solution.mask[:, 3].any()
    assert torch.isfinite(solution.weight).all()
    assert not RIA().solve(torch.zeros(4, 8), lifelike(4, 8)[1], Unstructured(), 0.5).weight.any()


def test_weights_of_inputs_that_never_fire_go_first_and_the_smaller_before_the_larger() -> None:
    W = torch.tensor([[9.0, 8, 1, 2]])
    unseen = Statistics(3, torch.zeros(4, dtype=torch.float64), None)
    assert RIA().solve(W, unseen, NM(2, 4), 0.5).weight.tolist() == [[9, 8, 0, 0]]
    heard = Statistics(3, torch.tensor([0, 1, 1, 1], dtype=torch.float64), None)
    assert RIA().solve(W, heard, Unstructured(), 0.25).weight.tolist() == [[0, 8, 1, 2]]
