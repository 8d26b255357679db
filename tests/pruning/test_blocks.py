"""Whole blocks leave: which ones, the budget, what is written, and what slim makes of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.errors import ModelError, RecipeError
from tawny.pruning import blocks as blocks_module
from tests.reference import blocks
from tests.tiny import tiny_model, tokens

KEYS = {"pattern": "blocks", "calibration": tokens(4, 24)}


def gone(record) -> list[int]:
    return sorted({x.block for x in record.linears if x.sparsity == 1})


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens(2, 16)).logits


@pytest.mark.parametrize("again", [1, 8])
def test_blocks_leave_without_which_the_model_is_nearest_to_the_dense_one(again):
    ids, model = tokens(4, 24), tiny_model("llama", num_hidden_layers=5)
    first = blocks.nearest(model, 1, ids)
    expected = blocks.nearest(model, 2, ids)
    record = tawny.prune(model, sparsity=0.4, **KEYS, **{"solver.again": again})
    assert set(first) < set(gone(record)) and len(gone(record)) == 2
    assert again == 1 or gone(record) == sorted(expected)


def test_influence_takes_the_blocks_that_turn_hidden_states_least():
    model = tiny_model("llama", num_hidden_layers=5)
    scores = blocks.influences(tiny_model("llama", num_hidden_layers=5), tokens(4, 24))
    record = tawny.prune(model, sparsity=0.4, solver="influence", **KEYS)
    assert gone(record) == sorted(sorted(range(5), key=lambda i: scores[i])[:2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral", "olmo2"])
def test_slim_leaves_zero_blocks_out_and_plain_transformers_opens_what_is_left(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "dense")
    record = tawny.prune(tmp_path / "dense", tmp_path / "pruned", sparsity=0.3, **KEYS)
    assert record.sparsity == pytest.approx(1 / 3) and len(gone(record)) == 1
    report = tawny.slim(tmp_path / "pruned", tmp_path / "slim")
    assert report.dropped == gone(record) and len(report.widths) == 2 and report.same_widths
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == 2
    assert len(config.get("layer_types", [0, 0])) == 2
    assert torch.allclose(logits(tmp_path / "slim"), logits(tmp_path / "pruned"), atol=1e-4)


def test_blocks_that_stay_are_trained_and_the_others_stay_zero(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    record = tawny.prune(
        tmp_path / "dense", tmp_path / "pruned", sparsity=0.3, **KEYS, **{"refine.epochs": 1}
    )
    assert len(record.refined) == 2 and record.zeros == pytest.approx(record.prunable / 3, rel=0.01)
    training = {"text": tokens(12, 24), "tokens": 24 * 12, "eval_every": 2, "lr": 1e-3, "compute": "float32"}
    made = tawny.recover(tmp_path / "pruned", tmp_path / "dense", tmp_path / "recovered", **training)
    assert made.zeros >= record.zeros and made.best["perplexity"] < made.start["perplexity"]
    assert tawny.slim(tmp_path / "recovered", tmp_path / "slim").dropped == gone(record)


def test_a_stopped_choice_goes_on_behind_the_blocks_that_have_left(tmp_path, monkeypatch):
    tiny_model("llama", num_hidden_layers=5).save_pretrained(tmp_path / "dense")
    keys = {"sparsity": 0.4, **KEYS}
    whole = tawny.prune(tmp_path / "dense", tmp_path / "whole", **keys)
    from tawny.pruning import blocks as choice

    looks = []

    def stopped(session, gone, candidates):
        if len(looks) == 1:
            looks.append(gone)
            raise KeyboardInterrupt
        looks.append(gone)
        return kept(session, gone, candidates)

    kept = choice._apart
    monkeypatch.setattr(choice, "_apart", stopped)
    with pytest.raises(tawny.errors.Interrupted):
        tawny.prune(tmp_path / "dense", tmp_path / "cut", **keys)
    assert tawny.prune(tmp_path / "dense", tmp_path / "cut", **keys).files == whole.files
    assert [len(left) for left in looks] == [0, 1, 1]


def test_an_allocation_file_says_which_blocks_leave(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text('"*": 0\n"model.layers.1.*": 1\n', encoding="utf-8")
    record = tawny.prune(tiny_model("llama"), sparsity=1 / 3, pattern="blocks", allocator=str(path))
    assert gone(record) == [1]
    path.write_text('"*": 0.5\n', encoding="utf-8")
    with pytest.raises(RecipeError, match="blocks leave as a whole"):
        tawny.prune(tiny_model("llama"), sparsity=0.5, pattern="blocks", allocator=str(path))


def test_what_cannot_leave_is_refused_in_one_line():
    for family, keys, said in (
        ("llama", {"sparsity": 0.95}, r"leaves no block.*0\.6666"),
        ("llama", {"sparsity": 0.3, "exclude": "model.layers.1.mlp.*"}, r"leaves model\.layers\.1\.mlp.*out"),
        ("llama", {"sparsity": 0.3, "allocator": "owl"}, "leave the allocator out"),
        ("llama", {"sparsity": 0.3, "solver": "wanda"}, "choose divergence, influence"),
        ("llama", {"sparsity": 0.3, "values": "int4"}, "masks of single weights"),
    ):
        with pytest.raises((ModelError, RecipeError), match=said):
            tawny.prune(tiny_model(family), **KEYS, **keys)


def test_a_block_that_still_fits_leaves_where_a_better_one_is_too_large():
    """A small dense block among large ones of experts: 36 are wanted, and 60 are nearer to that than none."""
    solver = SimpleNamespace(again=0)
    session = SimpleNamespace(job=SimpleNamespace(block_solver=solver))
    found = {"gone": [], "scores": [[0, 0.9], [1, 0.1], [2, 0.2]], "over": False}
    made = blocks_module._next(session, {0: 60, 1: 100, 2: 100}, 36.0, found)
    assert made["gone"] == [0] and not made["over"]
    assert blocks_module._next(session, {0: 60, 1: 100, 2: 100}, 36.0, made)["over"]
