"""Experts stored `[experts, in, out]`, from recipe to result: two families multiply by one at a time, one by all at once."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tests.end_to_end.test_prune import TRANSPOSED, prunable, same
from tests.tiny import tiny_model, tokens

KEYS = {"sparsity": 0.6, "compute": "float32", "allocator": "uniform"}
TRAINING = {"refine.epochs": 2, "refine.batch": 2, "refine.lr": 0.003}


def tiny(family, **changes):
    return tiny_model(family, **TRANSPOSED[family], **changes)


def experts_of(weights):
    return {name: weight for name, weight in weights.items() if ".experts." in name}


HOW = ["wanda uniform", "wanda owl", "sparsegpt owl", "sparsegpt atp", "alps owl"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", TRANSPOSED)
def test_a_folder_and_a_live_model_are_pruned_alike_and_as_far_as_asked(family, how, tmp_path):
    solver, allocator = how.split()
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


def multiplies_one_by_one(self, hidden):
    """What llama4's experts do, of a slice of the parameters at a time."""
    parts = []
    for expert, x in enumerate(hidden.view(4, -1, hidden.shape[-1])):
        gate, up = (x @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        parts.append((up * self.act_fn(gate)) @ self.down_proj[expert])
    return torch.cat(parts)


@pytest.mark.parametrize("source", ["live", "folder"])
@pytest.mark.parametrize("family", TRANSPOSED)
def test_refining_trains_what_is_left_of_every_expert_and_nothing_else_of_them(family, source, tmp_path):
    keys = KEYS | {"solver": "wanda", "calibration": tokens(32, 24), "exclude": ["experts.down_proj.1"]}
    dense = prunable(tiny(family))
    made = []
    for number, more in enumerate(({}, TRAINING)):
        model = tiny(family)
        if source == "live":
            record = tawny.prune(model, **keys | more)
        else:
            model.save_pretrained(tmp_path / "dense")
            record = tawny.prune(tmp_path / "dense", tmp_path / f"out{number}", **keys | more)
            model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}")
        made.append(prunable(model))
    before, after = (experts_of(weights) for weights in made)
    first = record.refined[0]
    assert first["best_epoch"] > 0 and first["after"] < first["before"]
    for name, weight in after.items():
        if name.endswith("down_proj.1"):
            assert torch.equal(weight, dense[name]), name
        elif ".layers.0." in name:
            assert torch.equal(weight == 0, before[name] == 0), name
            kept = weight != 0
            assert (weight[kept] != before[name][kept]).float().mean() > 0.5, name
    assert abs(record.sparsity - 0.6) < 0.01
    assert record.zeros == sum(int((made[1][entry.name] == 0).sum()) for entry in record.linears)


def test_experts_that_multiply_all_at_once_are_refined_as_one_by_one():
    made = []
    for apart in (False, True):
        model = tiny("llama4_text", num_hidden_layers=1)
        if apart:
            experts = model.model.layers[0].feed_forward.experts
            experts.forward = types.MethodType(multiplies_one_by_one, experts)
        keys = KEYS | {"solver": "magnitude", "include": ["experts.*"]}
        tawny.prune(model, **keys | TRAINING, calibration=tokens(16, 24))
        made.append(prunable(model))
    dense = prunable(tiny("llama4_text", num_hidden_layers=1))
    for name, weight in made[0].items():
        torch.testing.assert_close(weight, made[1][name], rtol=1e-3, atol=1e-4)
        kept = weight != 0
        assert not torch.equal(weight[kept], dense[name][kept]) or ".experts." not in name
