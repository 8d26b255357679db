"""Curves: linears lose weights until the next one costs the output as much as anywhere else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import Curves, Profile, Uniform
from tawny.allocation.curves import LEVELS, prices
from tawny.calibration.output import OutputFactor
from tawny.errors import NumericalError
from tests.reference import allocators as reference
from tests.reference.problems import lifelike

SHAPES = ((24, 32), (16, 32), (40, 16))


def inputs_of(block: int, scales: tuple[float, ...] = (1.0, 1.0, 1.0)) -> dict[str, tuple]:
    """Weights, norms and factors of a block whose outputs are felt so many times as much."""
    found = {}
    for i, (shape, scale) in enumerate(zip(SHAPES, scales, strict=True)):
        W, seen = lifelike(*shape, seed=10 * block + i, tokens=64)
        G = scale * torch.rand(shape[0], generator=torch.Generator().manual_seed(i))
        found[f"{block}.{i}"] = (W, replace(seen, output=OutputFactor(64, G)))
    return found


def profiled(*scales: tuple[float, ...]) -> Profile:
    measures = [json.loads(json.dumps(Curves().measure(inputs_of(i, each)))) for i, each in enumerate(scales)]
    return reference.model(len(scales), SHAPES, measures)


def costs_of(W, seen) -> torch.Tensor:
    return 0.5 * seen.output.diagonal[:, None] * W.square() * seen.squared_norms / seen.tokens


@settings(max_examples=20, deadline=None)
@given(target=st.floats(0.2, 0.8), scale=st.floats(0.01, 100))
def test_the_budget_is_exact_and_goes_where_one_price_for_all_weights_would_send_it(target, scale) -> None:
    profile = profiled((1, 1, 1), (scale, 1, 1))
    found = Curves(strength=1).allocate(profile, target)
    assert abs(reference.removed_in_all(found, profile) - target * sum(profile.sizes.values())) <= 0.5 + 1e-6
    costs = {
        name: costs_of(*given)
        for i, each in enumerate([1, scale])
        for name, given in inputs_of(i, (each, 1, 1)).items()
    }
    price = torch.cat([cost.flatten() for cost in costs.values()]).double().quantile(target)
    for name, cost in costs.items():
        wanted = float((cost <= price).double().mean())
        if LEVELS[0] < wanted < LEVELS[-1]:
            assert found[name] == pytest.approx(wanted, abs=0.06)


def test_what_the_output_feels_more_of_loses_less() -> None:
    even, louder = Curves().allocate(profiled((1, 1, 1)), 0.6), Curves().allocate(profiled((1, 30, 1)), 0.6)
    assert louder["0.1"] < even["0.1"] - 0.1 and louder["0.0"] > even["0.0"]


def test_strength_is_how_far_each_goes_from_the_target() -> None:
    profile = profiled((1, 1, 1), (9, 1, 1))
    assert Curves(strength=0).allocate(profile, 0.6) == Uniform().allocate(profile, 0.6)
    whole, some = (Curves(strength=strength).allocate(profile, 0.6) for strength in (1, 0.5))
    for name, share in some.items():
        assert share - 0.6 == pytest.approx(0.5 * (whole[name] - 0.6), abs=0.01)


def test_prices_are_squares_of_order_statistics() -> None:
    scores = torch.rand(400, 500, generator=torch.Generator().manual_seed(0))
    wanted = scores.flatten().double().quantile(torch.tensor(LEVELS, dtype=torch.float64)).square()
    assert torch.allclose(torch.tensor(prices(scores), dtype=torch.float64), wanted, rtol=0.04)


def test_linears_that_nothing_is_felt_of_get_the_target() -> None:
    nothing = profiled((0, 0, 0))
    assert Curves().allocate(nothing, 0.5) == Uniform().allocate(nothing, 0.5)
    assert Curves().allocate(profiled((1, 0, 1)), 0.6)["0.1"] == pytest.approx(0.6, abs=0.02)


def test_what_it_needs_is_said() -> None:
    W, seen = lifelike(8, 8)
    with pytest.raises(ValueError, match="output feels"):
        Curves().measure({"q": (W, seen)})
    with pytest.raises(NumericalError, match="finite"):
        Curves().measure({"q": (W * torch.nan, replace(seen, output=OutputFactor(4, torch.ones(8))))})
    assert (Curves().needs, Curves().output, Uniform().output) == ("norms", "rows", "none")
