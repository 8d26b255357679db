"""DLP against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tawny.allocation import Dlp, Profile
from tawny.errors import NumericalError
from tests.reference import allocators as reference
from tests.reference.problems import lifelike


def dense_blocks(count: int = 4):
    blocks = []
    for block in range(count):
        linears = {f"{block}.{i}": lifelike(12, 16 + 8 * i, 10 * block + i) for i in range(2)}
        blocks.append({name: (W * (1 + block % 3), s) for name, (W, s) in linears.items()})
    return blocks


def scores_of(block) -> np.ndarray:
    return np.concatenate([(W.abs() * s.squared_norms.sqrt()).numpy().ravel() for W, s in block.values()])


@pytest.mark.parametrize("statistic", ["median", "mean"])
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_blocks_with_large_typical_scores_lose_more(statistic: str, target: float) -> None:
    blocks, allocator = dense_blocks(), Dlp(statistic=statistic)
    profile = reference.model(4, [(12, 16), (12, 24)], [allocator.measure(block) for block in blocks])
    found = allocator.allocate(profile, target)
    # the lower median, as torch's
    typical = {
        "median": [float(torch.tensor(scores_of(block)).median()) for block in blocks],
        "mean": [float(scores_of(block).astype(np.float64).mean()) for block in blocks],
    }[statistic]
    importance = [1 - value / sum(typical) for value in typical]
    wanted = reference.banded(importance, [1] * 4, 0.3, target)
    for linear in profile.linears:
        assert found[linear.name] == pytest.approx(wanted[linear.block], abs=1.5 / linear.numel)
    assert reference.removed_in_all(found, profile) == round(target * sum(profile.sizes.values()))
    assert np.argsort(typical).tolist() == np.argsort([found[f"{b}.1"] for b in range(4)]).tolist()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("score", [0.0, 0.7])
def test_equal_blocks_are_uniform(blocks: int, score: float) -> None:
    measures = [{"median_score": score, "mean_score": score}] * blocks
    found = Dlp().allocate(reference.model(blocks, measures=measures), 0.5)
    assert set(found.values()) == {0.5}


def test_a_band_that_leaves_the_unit_interval_is_clamped_and_the_budget_stays_exact() -> None:
    measures = [{"median_score": float(m), "mean_score": 0.0} for m in (1, 2, 9)]
    profile = reference.model(3, measures=measures)
    found = Dlp(alpha=0.5).allocate(profile, 0.9)
    assert max(found.values()) == 1 and min(found.values()) >= 0
    assert reference.removed_in_all(found, profile) == round(0.9 * sum(profile.sizes.values()))


def test_a_block_without_prunable_linears_is_passed_over() -> None:
    W, statistics = lifelike(8, 8)
    measures = [
        Dlp().measure({"a": (W, statistics)}),
        Dlp().measure({}),
        Dlp().measure({"c": (2 * W, statistics)}),
    ]
    whole = reference.model(3, [(8, 8)], measures)
    profile = Profile(tuple(linear for linear in whole.linears if linear.block != 1), whole.measures)
    found = Dlp().allocate(profile, 0.5)
    assert found == pytest.approx({"0.0": 0.35, "2.0": 0.65}, abs=1 / 64)


def test_what_cannot_be_used_is_refused() -> None:
    W, statistics = lifelike(4, 8)
    with pytest.raises(NumericalError, match="o_proj"):
        Dlp().measure({"o_proj": (W * torch.inf, statistics)})
