"""One threshold for the whole model, against sorting all of its scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tawny.allocation import Global, LinearInfo, Profile
from tawny.allocation import scores as scores_module
from tawny.allocation.scores import BINS, exact_quantile, histogram, magnitude_scores, wanda_scores
from tawny.errors import NumericalError
from tests.reference import allocators as reference
from tests.reference.problems import lifelike


def measured(allocator, weights) -> Profile:
    """A profile of one linear a block."""
    linears, measures = [], []
    for block, (W, statistics) in enumerate(weights):
        linears.append(LinearInfo(str(block), tuple(W.shape), block))
        measures.append(allocator.measure({str(block): (W, statistics)}))
    return Profile(tuple(linears), tuple(measures))


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.7, 0.95])
def test_it_is_the_threshold_of_all_scores_sorted_together(score: str, target: float) -> None:
    weights = [lifelike(40, 64, seed) for seed in range(3)]
    weights = [(W * 2**i, statistics) for i, (W, statistics) in enumerate(weights)]
    profile = measured(Global(score=score), weights)
    function = {"wanda": wanda_scores, "magnitude": magnitude_scores}[score]
    scores = {str(i): function(W, statistics).numpy() for i, (W, statistics) in enumerate(weights)}
    found, wanted = Global(score=score).allocate(profile, target), reference.one_threshold(scores, target)
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name], abs=2e-3)
    assert reference.removed_in_all(found, profile) == round(target * sum(profile.sizes.values()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), target=st.floats(0, 1))
def test_magnitudes_of_bfloat16_are_ranked_without_error(seed: int, target: float) -> None:
    dice = torch.Generator().manual_seed(seed)
    Ws = [torch.randn(16, 16, generator=dice).bfloat16().float() * scale for scale in (1, 4)]
    allocator = Global(score="magnitude")
    profile = measured(allocator, [(W, None) for W in Ws])
    found = allocator.allocate(profile, target)
    threshold = torch.cat([W.abs().flatten() for W in Ws]).sort().values
    cut = float(threshold[min(round(target * 512), 511)])
    for i, W in enumerate(Ws):
        size = W.abs()
        # everything below the cut goes; of what equals it any part may
        low, high = int((size < cut).sum()), int((size <= cut).sum())
        assert low - 1 <= found[str(i)] * 256 <= high + 1


def test_only_totals_are_dense_however_many_linears_there_are() -> None:
    weights = [lifelike(8, 16, seed) for seed in range(40)]
    profile = measured(Global(), weights)
    with Largest() as largest:
        Global().allocate(profile, 0.7)
    assert BINS <= largest.numel <= BINS + 1


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that anything gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple) else (made,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return made


class Elsewhere:
    """Counts on another device: nothing of the CPU can be added to them before they are brought there."""

    def __init__(self, counts: torch.Tensor) -> None:
        self._counts = counts

    def cpu(self) -> torch.Tensor:
        return self._counts


def test_a_quantile_adds_up_counts_of_another_device(monkeypatch) -> None:
    linears = {"a": (torch.randn(4, 8), None), "b": (torch.randn(4, 8), None)}
    wanted = exact_quantile(linears, magnitude_scores)
    monkeypatch.setattr(scores_module, "histogram", lambda scores: Elsewhere(histogram(scores)))
    assert exact_quantile(linears, magnitude_scores) == wanted


def test_equal_scores_and_one_block_are_uniform() -> None:
    flat = [(torch.full((8, 16), 0.3), None) for _ in range(3)]
    allocator = Global(score="magnitude")
    assert set(allocator.allocate(measured(allocator, flat), 0.5).values()) == {0.5}
    zeros = [(torch.zeros(8, 16), None) for _ in range(3)]
    assert set(allocator.allocate(measured(allocator, zeros), 0.5).values()) == {0.5}
    one = measured(Global(), [lifelike(8, 16)])
    assert Global().allocate(one, 0.5)["0"] == pytest.approx(0.5)


def test_it_can_empty_a_linear_and_leave_another_dense_but_refuses_what_is_not_finite() -> None:
    weights = [(torch.rand(10, 10) + 1, None), (1000 * (torch.rand(10, 10) + 1), None)]
    allocator = Global(score="magnitude")
    assert allocator.allocate(measured(allocator, weights), 0.5) == {"0": 1.0, "1": 0.0}
    with pytest.raises(NumericalError, match=r"q_proj \(10, 10\)"):
        allocator.measure({"q_proj": (weights[0][0] * torch.nan, None)})


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_a_quantile_over_many_linears_is_that_of_one_sorted_list(sizes, share: float, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    linears = {
        str(i): (torch.randn(3, size, generator=dice) * 10.0 ** (i - 2), None) for i, size in enumerate(sizes)
    }
    linears["zeros"] = (torch.zeros(2, 2) * -1.0, None)
    everything = torch.cat([W.abs().flatten() for W, _ in linears.values()]).sort().values
    wanted = float(everything[int(share * (len(everything) - 1))])
    assert exact_quantile(linears, magnitude_scores, share) == wanted
    assert int(histogram(everything).sum()) == len(everything)


def test_magnitudes_need_no_data() -> None:
    assert Global(score="magnitude").needs == "none" and Global().needs == "norms"


def test_what_is_kept_of_a_linear_is_a_few_bytes_a_bin() -> None:
    found = Global(score="magnitude").measure({"0": (torch.randn(512, 512), None)})["histograms"]["0"]
    assert all(isinstance(text, str) for text in found.values())
    assert sum(map(len, found.values())) < 10_000  # of 1,500 bins
