"""Refitting inside a run: any mask, never a worse reconstruction, never another mask."""

from __future__ import annotations

import pytest
import torch

import tawny
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.solvers import SOLVERS
from tests.end_to_end.test_prune import prunable
from tests.tiny import tiny_model, tokens


def pruned(family="llama", **keys):
    model = tiny_model(family)
    record = tawny.prune(model, **{"compute": "float32", "calibration": tokens(), "sparsity": 0.6} | keys)
    return prunable(model), {entry.name: entry for entry in record.linears}


@pytest.mark.parametrize("pattern", ["unstructured", "row", "2:4"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_mask_reconstructs_worse_after_refitting(solver, pattern):
    keys = {"allocator": "uniform", "solver": solver, "pattern": pattern, "output": "none"}
    keys["sparsity"] = 0.5 if pattern == "2:4" else 0.6
    first = "model.layers.0."  # later blocks see other inputs
    before, old = pruned(**keys)
    after, new = pruned(refit=True, **keys)
    for name in (name for name in before if name.startswith(first)):
        assert torch.equal(before[name] == 0, after[name] == 0), name
        assert new[name].error <= new[name].notes["before_refit"], name
        if old[name].error_kind == "hessian":
            assert new[name].notes["before_refit"] == pytest.approx(old[name].error)
    if solver in ("magnitude", "wanda", "ria"):
        assert sum(entry.error for entry in new.values()) < 0.9 * sum(
            entry.notes["before_refit"] for entry in new.values()
        )


def test_an_expert_without_tokens_keeps_the_weights_it_had():
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # equal logits: top-2 always picks the same two experts
    dense = {name: weight.clone() for name, weight in prunable(model).items()}
    record = tawny.prune(
        model, sparsity=0.5, solver="wanda", refit=True, compute="float32", calibration=tokens()
    )
    unseen = [entry.name for entry in record.linears if entry.notes.get("tokens") == 0]
    after = prunable(model)
    assert unseen
    for name in unseen:
        assert torch.equal(after[name], torch.where(after[name] == 0, 0.0, dense[name])), name


def test_every_spelling_is_one_key():
    wanted = resolve_recipe(sparsity=0.5, solver="wanda", refit=True)
    assert wanted.refit
    assert resolve_recipe({"sparsity": 0.5, "solver": {"name": "wanda", "refit": True}}) == wanted
    assert Recipe.from_mapping({"sparsity": 0.5, "solver": {"name": "wanda", "refit": True}}) == wanted
    assert resolve_recipe({"sparsity": 0.5}, ["solver=wanda", "solver.refit=true"]) == wanted
    assert resolve_recipe({"sparsity": 0.5}, ["solver.refit=true"], solver="wanda") == wanted
    assert resolve_recipe(wanted, ["refit=false"]).refit is False
    assert resolve_recipe({"sparsity": 0.5, "solver": {"refit": True}}, solver="wanda") == wanted


def test_a_refit_of_a_solver_that_asked_the_output_never_makes_the_output_feel_more():
    """What is felt falls although the linear's own error may rise."""
    keys = {"allocator": "uniform", "solver": "sparsegpt", "output": "rows"}
    before, _ = pruned(**keys)
    after, _ = pruned(refit=True, **keys)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before if ".0." in name)
