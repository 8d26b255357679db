"""`tawny.loops`: what counts as a loop, and what a model writes."""

from __future__ import annotations

import json

import pytest
import torch

import tawny
from tawny.errors import RecipeError
from tawny.evaluation.loops import ENDS, PASSAGE, repeated
from tests.encoders import tiny_encoder
from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer


@pytest.mark.parametrize("period", [1, 3, PASSAGE])
def test_a_passage_that_repeats_is_a_loop(period):
    passage = list(range(period))
    assert repeated([99, 98, *(passage * ENDS)[: 2 * ENDS]]) != []
    assert len(repeated((passage * ENDS)[:ENDS])) == period


def test_what_changes_once_or_ends_early_or_is_long_is_no_loop():
    assert repeated([7] * (ENDS - 1)) == []
    assert repeated([7] * (ENDS - 1) + [8]) == []
    assert repeated(list(range(PASSAGE + 1)) * 4) == []


@pytest.fixture
def models(tmp_path):
    """A model that always says the same, and one that does not."""
    (tmp_path / "plain.txt").write_text("some text that somebody wrote " * 400)
    for name in ("same", "dense"):
        model = tiny_model("llama", vocab_size=len(tiny_tokenizer()), max_position_embeddings=512)
        if name == "same":
            with torch.no_grad():
                model.lm_head.weight.zero_()
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def greedy(folder, start, tokens):
    """The slow twin: one forward of everything for each token."""
    model = tawny.load(folder, dtype="float32")
    ids = start[None]
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(start) :].tolist()


def test_loops_are_counted_beside_the_dense_model(models, run):
    text = models / "plain.txt"
    keys = {"prompts": 3, "tokens": 70, "compute": "float32"}
    found = tawny.loops(models / "same", str(text), against=models / "dense", **keys)
    assert (found.looped, found.prompts) == (3, 3) and len(found.passages) == 3
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[: 3 * 32].reshape(3, 32)
    assert found.dense == sum(bool(repeated(greedy(models / "dense", row, 70))) for row in ids)
    code, out, err = run("eval", models / "same", "--text", text, "--loops", "--json")
    told = json.loads(out)
    assert code == 0 and told["looped"] == told["prompts"] and told["dense"] is None, err


def test_too_few_tokens_and_options_of_a_perplexity_are_refused(models, run):
    with pytest.raises(RecipeError, match="3 tokens: expected 1 of 64, or more"):
        tawny.loops(models / "same", str(models / "plain.txt"), tokens=3)
    for option in (("--windows", 3), ("--labels", "folder"), ("--no-bos",)):
        code, _, err = run("eval", models / "same", "--loops", *option)
        assert code == 2 and option[0] in err and "leave" in err and err.count("\n") == 1
    tiny_encoder("bert").save_pretrained(models / "encoder")
    code, _, err = run("eval", models / "encoder", "--text", models / "plain.txt", "--loops")
    assert code == 2 and "predicts no next token" in err.splitlines()[-1]
