"""Experts stored `[experts, in, out]`, from recipe to result: two families multiply by one at a time, one by all at once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tests.end_to_end.test_prune import TRANSPOSED, prunable, same
from tests.tiny import tiny_model, tokens

KEYS = {"sparsity": 0.6, "compute": "float32", "allocator": "uniform"}


def tiny(family, **changes):
    return tiny_model(family, **TRANSPOSED[family], **changes)


def experts_of(weights):
    return {name: weight for name, weight in weights.items() if ".experts." in name}


@pytest.mark.parametrize(
    ("family", "solver", "allocator"),
    [
        *((family, *how) for family in TRANSPOSED for how in (("wanda", "owl"), ("sparsegpt", "atp"))),
        ("gpt_oss", "alps", "owl"),
    ],
)
def test_a_folder_and_a_live_model_are_pruned_alike_and_as_far_as_asked(family, solver, allocator, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "dense")
    keys = KEYS | {"solver": solver, "allocator": allocator, "calibration": tokens()}
    record = tawny.prune(tmp_path / "dense", tmp_path / "out", **keys)
    tawny.prune(model, **keys)
    weights = prunable(model)
    assert same(weights, prunable(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    assert not record.warnings
    assert abs(record.zeros - 0.6 * record.prunable) <= len(weights)
    assert len(experts_of({entry.name: entry for entry in record.linears})) == 3 * 2 * 4
    for entry in record.linears:
        assert abs(entry.zeros - entry.target * entry.shape[0] * entry.shape[1]) <= 1, entry.name
        assert entry.zeros == int((weights[entry.name] == 0).sum()), entry.name


@pytest.mark.parametrize("family", TRANSPOSED)
def test_sparsegpt_keeps_more_than_magnitude_of_what_an_expert_gives_for_its_own_tokens(family):
    dense, ids = tiny(family), tokens(16, 24)
    layer = dense.model.layers[0]
    mixture = layer.feed_forward if family == "llama4_text" else layer.mlp
    seen = []
    handle = mixture.router.register_forward_hook(lambda module, args, given: seen.append((args[0], given)))
    with torch.no_grad():
        dense(input_ids=ids, use_cache=False)
    handle.remove()
    ((hidden, given),) = seen
    logits = given[1 if family == "llama4_text" else 0]
    best = TRANSPOSED[family].get("num_experts_per_tok") or TRANSPOSED[family]["moe_topk"]
    scores = logits.sigmoid() if family == "llama4_text" else torch.ones_like(logits)
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(best).indices, 1.0) * scores
    made = {}
    for solver in ("magnitude", "sparsegpt"):
        model = tiny(family)
        needed = {} if solver == "magnitude" else {"calibration": ids}
        tawny.prune(model, **KEYS | {"solver": solver, "include": ["experts.*"]} | needed)
        made[solver] = prunable(model)
    wanted = prunable(dense)
    for name in experts_of(wanted):
        if ".layers.0." in name and "gate_up_proj" in name:
            X_TI = hidden.double() * chosen[:, int(name[-1]), None]
            energy = (X_TI @ wanted[name].double().T).square().sum()
            lost = {
                solver: float((X_TI @ (wanted[name] - made[solver][name]).double().T).square().sum() / energy)
                for solver in made
            }
            assert 0 < lost["sparsegpt"] < 0.9 * lost["magnitude"], (name, lost)


@pytest.mark.parametrize(("family", "never"), [("llama4_text", 3), ("mixtral", 2)])
def test_an_expert_that_no_token_is_routed_to_is_pruned_by_its_weights_and_said(family, never):
    model = tiny_model(family, **TRANSPOSED.get(family, {}))
    for layer in model.model.layers:
        router = layer.feed_forward.router if family == "llama4_text" else layer.mlp.gate
        router.weight.data.zero_()  # equal logits: the best are always the same
    record = tawny.prune(model, **KEYS, solver="sparsegpt", calibration=tokens())
    unseen = [entry for entry in record.linears if entry.notes.get("tokens") == 0]
    assert len(unseen) == len(record.warnings) == 3 * 2 * never
    assert all(abs(entry.sparsity - entry.target) < 0.01 for entry in unseen)
