"""LSA's greedy reconstruction error against trying every removal, and its allocation against the formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import LinearInfo, Lsa, Profile
from tawny.allocation.lsa import half_removal_error
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.kernels import native
from tests.reference import allocators as reference
from tests.reference.lsa import half_removal_error_by_trial
from tests.reference.problems import lifelike


@settings(max_examples=15, deadline=None)
@given(
    kernel=st.sampled_from(native.available()),
    out=st.integers(1, 4),
    width=st.integers(2, 14),
    group=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 10**6),
)
def test_the_fast_error_is_that_of_trying_every_removal(kernel, out, width, group, seed):
    W, statistics = lifelike(out, width, seed, loud=1)
    H = statistics.hessian
    wanted = half_removal_error_by_trial(W, H, group)
    with native.force(kernel):
        found = float(half_removal_error(W, H, group).sum())
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4 * float(H.diagonal().min()))


@pytest.mark.parametrize(("out", "width"), [(3, 128), (70, 300), (257, 129)])
def test_every_kernel_agrees_with_plain_torch(kernel, out: int, width: int) -> None:
    W, statistics = lifelike(out, width)
    found = half_removal_error(W, statistics.hessian)
    with native.force("torch"):
        wanted = half_removal_error(W, statistics.hessian)
    # Which of two nearly equal costs goes first may differ.
    assert torch.allclose(found, wanted, rtol=0.02)
    assert float(found.sum()) == pytest.approx(float(wanted.sum()), rel=1e-3)


def test_the_error_does_not_depend_on_the_number_of_threads(kernel) -> None:
    W, statistics = lifelike(67, 200)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(half_removal_error(W, statistics.hessian))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-6)


def test_a_weight_that_is_a_view_gives_the_same(kernel) -> None:
    W, statistics = lifelike(12, 40)
    wide = torch.randn(12, 100)
    wide[:, 7:47] = W
    assert torch.equal(
        half_removal_error(wide[:, 7:47], statistics.hessian, 16),
        half_removal_error(W, statistics.hessian, 16),
    )


def test_rows_are_treated_alike_in_whatever_tile_they_fall(monkeypatch) -> None:
    W, statistics = lifelike(11, 40)
    with native.force("torch"):
        whole = half_removal_error(W, statistics.hessian, 16).tolist()
        monkeypatch.setattr("tawny.allocation.lsa._TILE", 4)
        assert half_removal_error(W, statistics.hessian, 16).tolist() == pytest.approx(whole, rel=1e-4)


def test_it_removes_less_than_removing_the_smallest_weights_would_cost() -> None:
    W, statistics = lifelike(16, 64)
    scores = W.abs() * statistics.squared_norms.sqrt()
    lost = W.masked_fill(scores > scores.median(1, keepdim=True).values, 0)
    wanda = float(torch.trace(lost @ statistics.hessian @ lost.T))
    assert half_removal_error(W, statistics.hessian, 64).sum() < wanda


def test_silent_inputs_and_zero_weights_cost_nothing() -> None:
    W, statistics = lifelike(4, 16)
    H = statistics.hessian
    H[::2], H[:, ::2] = 0, 0
    assert not half_removal_error(W, H, 8).any()
    assert not half_removal_error(torch.zeros(4, 16), statistics.hessian, 8).any()


def profile_of(errors, **kinds) -> Profile:
    shape = reference.model(3, [(16, 16), (16, 16), (16, 32)])
    measures = [{"half_removal_error": {f"{b}.{i}": errors[3 * b + i] for i in range(3)}} for b in range(3)]
    groups = ["0", "0", "1"]
    linears = tuple(
        LinearInfo(linear.name, linear.shape, linear.block, groups[i % 3])
        for i, linear in enumerate(shape.linears)
    )
    return Profile(linears, tuple(measures))


@pytest.mark.parametrize("granularity", ["block", "group", "linear"])
def test_units_that_lose_most_are_pruned_most(granularity: str) -> None:
    errors = [1.0, 3.0, 8.0, 2.0, 2.0, 5.0, 4.0, 9.0, 20.0]
    profile = profile_of(errors)
    members = {
        "block": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
        "group": [[0, 1], [2], [3, 4], [5], [6, 7], [8]],
        "linear": [[i] for i in range(9)],
    }[granularity]
    sizes = list(profile.sizes.values())
    e = [sum(errors[i] for i in unit) / len(unit) for unit in members]
    importance = [1 - value / sum(e) for value in e]
    weights = [sum(sizes[i] for i in unit) for unit in members]
    wanted = reference.banded(importance, weights, 0.2, 0.6)
    found = Lsa(alpha=0.1, granularity=granularity).allocate(profile, 0.6)
    for unit, value in zip(members, wanted, strict=True):
        for i in unit:
            assert found[profile.linears[i].name] == pytest.approx(value, abs=1.5 / sizes[i])
    assert reference.removed_in_all(found, profile) == round(0.6 * sum(sizes))


@pytest.mark.parametrize(
    ("target", "alpha"), [(0.7, 0.15), (0.5, 0.04), (0.65, 0.125), (0.05, 0.03), (0.95, 0.03)]
)
def test_the_strength_is_the_papers_for_the_sparsity(target: float, alpha: float) -> None:
    profile = profile_of([1.0, 1, 1, 2, 2, 2, 3, 3, 3])
    assert Lsa().allocate(profile, target) == Lsa(alpha=alpha).allocate(profile, target)


def test_equal_errors_are_uniform() -> None:
    for error in (0.0, 2.5):
        assert set(Lsa().allocate(profile_of([error] * 9), 0.5).values()) == {0.5}


def test_measures_are_named_and_what_cannot_be_used_is_refused() -> None:
    W, statistics = lifelike(4, 8)
    measured = Lsa().measure({"q": (W, statistics), "k": (2 * W, statistics)})["half_removal_error"]
    assert measured["k"] == pytest.approx(4 * measured["q"], rel=1e-4)
    copied = Statistics(statistics.tokens, statistics.squared_norms, statistics.hessian.clone())
    alone = Lsa().measure({"q": (W, statistics), "k": (2 * W, copied)})["half_removal_error"]
    assert alone == pytest.approx(measured, rel=1e-4)
    statistics.hessian[1, 2] = torch.nan
    with pytest.raises(NumericalError, match="gate_proj"):
        Lsa().measure({"gate_proj": (W, statistics)})
    with pytest.raises(ValueError, match="Hessian"):
        Lsa().measure({"q": (W, None)})
