"""A profile for several allocators at once is what each would have measured alone."""

from __future__ import annotations

import pytest

import tawny
from tawny.errors import RecipeError
from tests.tiny import tiny_model, tokens


def test_several_allocators_are_measured_in_one_walk():
    model, data = tiny_model("llama"), {"calibration": tokens()}
    names = ["owl", "dlp", "lsa", "er", "uniform"]
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
