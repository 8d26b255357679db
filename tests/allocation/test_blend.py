"""Blend: the mean of other allocators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.allocation import Alpha, Atp, Blend, Dlp, Owl, Profile, Uniform
from tawny.allocation.joint import Joint
from tawny.errors import NumericalError, RecipeError
from tests.reference import allocators as reference
from tests.reference.problems import lifelike


def measured(*allocators, blocks: int = 3) -> tuple[Profile, list[list[dict]]]:
    """Shapes of a small model, and what each allocator measures of its blocks."""
    profile = reference.model(blocks)
    found: list[list[dict]] = [[] for _ in allocators]
    for block in range(blocks):
        inputs = {
            linear.name: lifelike(*linear.shape, seed=10 * block + i)
            for i, linear in enumerate(profile.linears_of(block))
        }
        for allocator, measures in zip(allocators, found, strict=True):
            measures.append(allocator.measure(inputs))
    return profile, found


@settings(max_examples=25, deadline=None)
@given(target=st.floats(0.2, 0.8))
def test_each_linear_gets_the_mean_of_what_the_others_give_it(target: float) -> None:
    blend = Blend(of="owl, atp,alpha")
    shapes, (owl, alpha, both) = measured(Owl(), Alpha(), blend)
    found = blend.allocate(Profile(shapes.linears, tuple(both)), target)
    alone = [
        Owl().allocate(Profile(shapes.linears, tuple(owl)), target),
        Atp().allocate(shapes, target),
        Alpha().allocate(Profile(shapes.linears, tuple(alpha)), target),
    ]
    for linear in shapes.linears:
        wanted = sum(one[linear.name] for one in alone) / 3
        assert found[linear.name] == pytest.approx(wanted, abs=1.5 / linear.numel)
    assert abs(reference.removed_in_all(found, shapes) - target * sum(shapes.sizes.values())) <= 0.5 + 1e-6


def test_it_needs_measures_and_costs_what_its_members_do() -> None:
    assert (Blend().needs, Blend().measures_weights) == ("none", True)
    assert (Blend(of="atp,uniform").needs, Blend(of="atp,uniform").measures_weights) == ("none", False)
    assert Blend(of="atp,dlp").needs == "norms" and Blend(of="dlp,lsa").needs == "hessian"
    W, statistics = lifelike(8, 8)
    assert set(Blend(of="atp,dlp").measure({"q": (W, statistics)})) == {"dlp"}
    with pytest.raises(NumericalError, match="finite"):
        Blend().measure({"q": (torch.full((4, 4), torch.nan), None)})
    linears = reference.model(2, [(8, 4)]).linears
    assert Alpha().work(linears) == 2 * (4 * 16 * 8 + 8 * 64)
    assert Blend().work(linears) == Alpha().work(linears) and Blend(of="atp,dlp").work(linears) == 0


def test_one_allocator_blended_with_nothing_is_itself() -> None:
    shapes, (dlp, blended) = measured(Dlp(), Blend(of="dlp"))
    wanted = Dlp().allocate(Profile(shapes.linears, tuple(dlp)), 0.6)
    assert Blend(of="dlp").allocate(Profile(shapes.linears, tuple(blended)), 0.6) == wanted
    assert Blend(of="uniform").allocate(shapes, 0.5) == Uniform().allocate(shapes, 0.5)


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ("", "expected different"),
        ("atp,atp", "different"),
        ("atp,alfa", "alpha"),
        ("atp,blend", "'blend'"),
        ("atp,file", "'file'"),
        ("atp,auto", "'auto'"),
    ],
)
def test_what_cannot_be_blended_is_refused(of: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Blend(of=of)


def test_what_several_want_is_measured_once(monkeypatch) -> None:
    calls = []
    measure = Alpha.measure
    monkeypatch.setattr(Alpha, "measure", lambda self, linears: calls.append(self) or measure(self, linears))
    several = Joint({"alpha": Alpha(), "blend": Blend("atp,alpha"), "mid": Alpha(fit="mid")})
    profile = reference.model(1)
    inputs = {x.name: lifelike(*x.shape, seed=i) for i, x in enumerate(profile.linears)}
    made = several.measure(inputs)
    assert calls == [Alpha(), Alpha(fit="mid")]
    assert made["alpha"] == made["blend"]["alpha"] == Alpha().measure(inputs) != made["mid"]
