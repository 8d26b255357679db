"""A profile for several allocators at once is what each would have measured alone."""

from __future__ import annotations

import pytest

import tawny
from tawny.allocation import Alpha, LinearInfo
from tawny.errors import RecipeError
from tawny.pruning import plan as plan_module
from tests.tiny import tiny_model, tokens


def test_several_allocators_are_measured_in_one_walk():
    model, data = tiny_model("llama"), {"calibration": tokens()}
    names = ["owl", "dlp", "lsa", "er", "uniform", "blend"]
    together = tawny.profile(model, allocators=names, sparsity=0.6, **data)
    assert list(together.allocations) == names
    for name in names:
        alone = tawny.profile(model, allocators=[name], sparsity=0.6, **data).allocations[name]
        assert alone == together.allocations[name]
        assert sum(alone) / len(alone) == pytest.approx(0.6, abs=1e-3)
    assert together.allocations["owl"] != together.allocations["dlp"]


def test_the_recipes_own_allocator_keeps_its_options():
    model, data = tiny_model("llama"), {"calibration": tokens()}
    wide = tawny.profile(
        model, allocators=["owl"], sparsity=0.6, allocator="owl", **{"allocator.lambda": 0.2}, **data
    )
    usual = tawny.profile(model, allocators=["owl"], sparsity=0.6, **data)
    assert max(wide.allocations["owl"]) > max(usual.allocations["owl"])


def test_an_unknown_allocator_names_its_neighbour():
    with pytest.raises(RecipeError, match="did you mean 'dlp'"):
        tawny.profile(tiny_model("llama"), allocators=["dlpp"], calibration=tokens())


def test_a_plan_counts_what_an_allocator_measures_beside_statistics(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(plan_module, "measured_speed", lambda dtype: 1e6)
    options = {"sparsity": 0.5, "solver": "magnitude", "calibration": "wiki"}
    planned = {
        name: tawny.plan(tmp_path / "dense", allocator=name, **options)
        for name in ("uniform", "alpha", "blend")
    }
    linears = [LinearInfo(x["name"], tuple(x["shape"]), x["block"]) for x in planned["alpha"].linears]
    seconds = {name: plan.seconds["profile"] for name, plan in planned.items()}
    assert seconds["uniform"] == 0
    assert seconds["alpha"] == seconds["blend"] == pytest.approx(Alpha.work(linears) / 1e6, abs=0.06)
