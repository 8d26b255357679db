"""AlphaPruning: power laws of spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import Alpha
from tawny.allocation.alpha import NO_TAIL, _starts_around_peak, hill_alpha, spectrum
from tawny.errors import NumericalError
from tests.reference import allocators as reference
from tests.reference import alpha as slow


@settings(max_examples=30, deadline=None)
@given(out=st.integers(3, 40), width=st.integers(3, 40), seed=st.integers(0, 10**6))
def test_spectrum_and_both_fits_are_those_of_singular_values_and_a_loop(out, width, seed):
    W = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    W *= torch.linspace(0.2, 3, width)
    values = slow.eigenvalues(W)
    found = spectrum(W)
    assert found.tolist() == pytest.approx(values, rel=1e-7, abs=1e-12)
    assert hill_alpha(found, "mid") == pytest.approx(min(slow.alpha_mid(values), NO_TAIL), rel=1e-5)
    peak = slow.alpha_peak(values)
    if not math.isnan(peak):  # the histogram's peak may have no eigenvalue around it
        assert hill_alpha(found, "peak") == pytest.approx(min(peak, NO_TAIL), rel=1e-2)


@pytest.mark.parametrize("fit", ["mid", "peak"])
def test_the_exponent_of_a_power_law_is_recovered(fit: str) -> None:
    dice = np.random.default_rng(0)
    values = torch.tensor(np.sort((1 - dice.random(20_000)) ** (-1 / 1.5)))  # p(λ) ∝ λ^−2.5 above 1
    assert hill_alpha(values, fit) == pytest.approx(2.5, abs=0.1)


def test_the_released_code_admits_starts_far_below_the_peak() -> None:
    dice = np.random.default_rng(0)
    values = torch.tensor(np.sort(100 * dice.lognormal(0, 1, 400)))
    ours, theirs = (_starts_around_peak(values, official) for official in (False, True))
    assert set(ours) < set(theirs) and theirs[0] == 0 and max(ours) == max(theirs)


def test_orthogonal_zero_and_tiny_weights_have_no_tail_and_no_nan() -> None:
    orthogonal = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    for W in (orthogonal.double(), torch.eye(8), torch.zeros(4, 6), torch.ones(1, 1), torch.ones(3, 5)):
        for fit in ("mid", "peak"):
            alpha = hill_alpha(spectrum(W), fit)
            assert 1 < alpha <= NO_TAIL


def profile_of(alphas, blocks=3, widths=((8, 8), (16, 8))):
    names = [linear.name for linear in reference.model(blocks, widths).linears]
    table = dict(zip(names, alphas, strict=True))
    measures = [{"alpha": {n: a for n, a in table.items() if n.startswith(f"{b}.")}} for b in range(blocks)]
    return reference.model(blocks, widths, measures)


@pytest.mark.parametrize("granularity", ["block", "linear"])
def test_sparsity_rises_with_alpha_within_the_band_rescaled_to_the_budget(granularity: str) -> None:
    alphas = np.array([2.0, 3.0, 4.0, 5.0, 2.5, 3.5])
    profile = profile_of(alphas)
    found = Alpha(granularity=granularity).allocate(profile, 0.5)
    values = alphas if granularity == "linear" else alphas.reshape(3, 2).mean(1).repeat(2)
    ratios = 0.7 + 0.6 * (values - values.min()) / (values.max() - values.min())
    sizes = np.array(list(profile.sizes.values()))
    wanted = 0.5 * ratios * sizes.sum() / (ratios * sizes).sum()
    for linear, value in zip(profile.linears, wanted, strict=True):
        assert found[linear.name] == pytest.approx(value, abs=1.5 / linear.numel)
    assert reference.removed_in_all(found, profile) == round(0.5 * sizes.sum())


@pytest.mark.parametrize("granularity", ["block", "linear"])
def test_a_linear_without_a_tail_counts_as_the_lightest_of_those_that_have_one(granularity: str) -> None:
    found = Alpha(granularity=granularity).allocate(profile_of([2.0, 3.0, 4.0, NO_TAIL, 2.5, 3.5]), 0.5)
    assert found == Alpha(granularity=granularity).allocate(profile_of([2.0, 3.0, 4.0, 4.0, 2.5, 3.5]), 0.5)
    assert set(Alpha().allocate(profile_of([NO_TAIL] * 6), 0.5).values()) == {0.5}


def test_equal_alphas_and_one_block_are_uniform() -> None:
    assert set(Alpha().allocate(profile_of([3.0] * 6), 0.5).values()) == {0.5}
    assert set(Alpha().allocate(profile_of([2.0, 4.0], 1), 0.5).values()) == {0.5}


def test_ratios_above_one_are_clamped_and_made_up_for() -> None:
    profile = profile_of([2, 2, 3, 3, 4, 4])
    found = Alpha().allocate(profile, 0.9)
    assert max(found.values()) == 1
    assert reference.removed_in_all(found, profile) == round(0.9 * sum(profile.sizes.values()))


def test_it_measures_every_linear_of_a_block_without_statistics() -> None:
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    measured = Alpha(fit="mid").measure({"a": (W, None), "b": (2 * W, None)})
    assert measured["alpha"]["a"] == pytest.approx(measured["alpha"]["b"])
    with pytest.raises(NumericalError, match="up_proj"):
        Alpha().measure({"up_proj": (W * torch.nan, None)})
