"""Uniform allocation."""

from __future__ import annotations

import pytest

from tawny.allocation import Uniform
from tests.reference.allocators import model, removed_in_all


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.701, 0.999])
def test_every_linear_gets_the_target_to_within_one_weight(target: float) -> None:
    profile = model(5, ((7, 9), (3, 11)))
    allocation = Uniform().allocate(profile, target)
    assert all(abs(allocation[name] - target) <= 1 / size for name, size in profile.sizes.items())
    assert removed_in_all(allocation, profile) == round(target * sum(profile.sizes.values()))


def test_it_measures_nothing_and_official_gives_the_target_itself() -> None:
    assert (Uniform().needs, Uniform().measures_weights) == ("none", False) and Uniform().measure({}) == {}
    assert set(Uniform(compat="official").allocate(model(2), 0.777).values()) == {0.777}
