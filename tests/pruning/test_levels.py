"""Solutions at several levels; what is made of them is in test_search.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tawny
from tawny.allocation import Dlp
from tawny.allocation.profile import LinearInfo
from tawny.model.blocks import Stack, live_stack
from tawny.model.streams import Samples
from tawny.patterns import Unstructured
from tawny.pruning.levels import LevelStore, solve_levels
from tawny.pruning.profiling import Together
from tawny.pruning.space import make_space
from tawny.recipe import resolve_recipe
from tests.tiny import tiny_model, tokens


def solved_levels(model, folder, *, sparsity=0.5, step=0.1, solver="wanda", candidates=None):
    """All blocks at the levels of a search, and the space they are in."""
    stack = live_stack(model)
    by_block = [stack.linears(index) for index in range(len(stack))]
    infos = tuple(LinearInfo(x.name, x.shape, i) for i, some in enumerate(by_block) for x in some)
    space = make_space(infos, Unstructured(), sparsity, 3, step)
    recipe = resolve_recipe(sparsity=sparsity, solver=solver)
    solved = solve_levels(
        stack,
        by_block,
        space,
        LevelStore(folder, space, torch.float32),
        recipe=recipe,
        solver=recipe.make_solver(),
        measuring=Together(candidates or {}, (5.0,)),
        samples=Samples(tokens(4, 24)),
        held_out=Samples(tokens(2, 16, seed=9)),
        watch=tawny.watch.silent,
    )
    return space, solved


def test_one_weight_of_a_block_is_in_float32_at_a_time(tmp_path, monkeypatch):
    """Whatever looks at it: the hash, each allocator's measure, each level's solve."""
    alive, most = weakref.WeakSet(), 0
    weight = Stack.weight

    def counted(self, linear):
        nonlocal most
        made = weight(self, linear)
        gc.collect()
        alive.add(made)
        most = max(most, len(alive))
        return made

    monkeypatch.setattr(Stack, "weight", counted)
    solved_levels(tiny_model("llama"), tmp_path / "search", candidates={"dlp": Dlp()})
    assert 1 <= most <= 2  # the next one is made before a loop's variable lets go of the last


@pytest.mark.parametrize(("sparsity", "step"), [(0.5, 0.1), (0.25, 0.25)])
def test_a_linear_that_saw_no_token_is_named_once_whatever_the_levels_are(sparsity, step, tmp_path):
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # equal logits: top-2 always picks the same two experts
    space, solved = solved_levels(model, tmp_path / "search", sparsity=sparsity, step=step)
    assert (space.sparsity(0, space.low) == 0) == (sparsity == step)
    named = [warning.partition(" ")[0] for warning in solved.warnings]
    assert len(named) == len(set(named)) == 3 * 2 * 2
    assert all(".experts." in name for name in named)
