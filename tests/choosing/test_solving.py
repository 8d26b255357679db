"""Solutions at several levels; what is made of them is in test_search.py."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tawny
from tawny.allocation import Dlp
from tawny.model.stack import Stack, live_stack
from tests.choosing.parts import solved_levels
from tests.tiny import tiny_model, tokens

LEVELS = {"count": 3, "windows": 2}


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
    gc.freeze()  # what other tests left is not looked through each time
    try:
        solved_levels(tiny_model("llama"), tmp_path / "levels", candidates={"dlp": Dlp()}, **LEVELS)
    finally:
        gc.unfreeze()
    assert 1 <= most <= 2  # the next one is made before a loop's variable lets go of the last


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_linear_that_saw_no_token_is_named_once_whatever_the_levels_are(pattern, tmp_path):
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # equal logits: top-2 always picks the same two experts
    _, space, _, _, solved = solved_levels(model, tmp_path / "levels", pattern=pattern, count=5, windows=2)
    assert (space.sparsity(0, space.low) == 0) == (pattern == "2:4")
    named = [warning.partition(" ")[0] for warning in solved.warnings]
    assert len(named) == len(set(named)) == 3 * 2 * 2
    assert all(".experts." in name for name in named)


@pytest.mark.parametrize("values", [None, "int3"])
def test_a_level_that_removes_nothing_is_rounded_where_all_are(values, tmp_path):
    model = tiny_model("llama")
    keys = {"pattern": "2:4", "solver": "sparsegpt", "values": values}
    job, space, store, _, _ = solved_levels(model, tmp_path / "levels", **keys, count=5, windows=2)
    assert space.sparsity(0, space.low) == 0
    linear = job.by_block[0][0]
    store.open(0)
    whole = store.read(linear, space.low)
    assert (whole is None) == (values is None)
    if values is not None:
        assert not (whole == 0).all() and len(whole[0].unique()) <= 8  # of 3 bits


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "magnitude"])
def test_the_solutions_of_the_target_are_the_weights_of_a_uniform_run(solver, tmp_path):
    """So each linear was solved for what it receives after pruned blocks, and behind pruned stages of its own."""
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, _, store, _, _ = solved_levels(model, tmp_path / "levels", sparsity=0.6, solver=solver, **LEVELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pruned = tiny_model("llama")
    options = {"sparsity": 0.6, "allocator": "uniform", "solver": solver, "compute": "float32"}
    tawny.prune(pruned, calibration=tokens(4, 24), **options)
    stack = live_stack(pruned)
    for index in range(len(stack)):
        store.open(index)
        for linear in stack.linears(index):
            torch.testing.assert_close(store.read(linear, 0), stack.weight(linear), rtol=0, atol=0)
