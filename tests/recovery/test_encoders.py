"""Encoders learn the features of their dense model."""

from __future__ import annotations

import copy

import pytest
import torch

import tawny
from tawny.errors import ModelError, RecipeError
from tests.encoders import inputs_for, tiny_encoder
from tests.recovery.models import SHORT
from tests.tiny import tokens
from tests.tokenizer import tiny_tokenizer


def test_a_model_of_several_stacks_is_refused():
    dense = tiny_encoder("swin")
    with pytest.raises(ModelError, match=r"several stacks.*keep_sparsity"):
        tawny.recover(copy.deepcopy(dense), dense, text=inputs_for(dense))


@pytest.mark.parametrize("name", ["bert", "masked"])
def test_a_pruned_encoder_comes_nearer_to_its_dense_model_and_keeps_its_zeros(name):
    dense = tiny_encoder(name)
    pruned = copy.deepcopy(dense)
    tawny.prune(pruned, sparsity=0.5, solver="magnitude", allocator="uniform")
    before = {key: p.detach() == 0 for key, p in pruned.named_parameters() if p.dim() == 2}
    record = tawny.recover(pruned, dense, text=tokens(24), **SHORT)
    assert record.best["loss"] < record.start["loss"] and record.zeros == record.zeros_before
    assert "perplexity" not in record.start
    assert all(bool((p[before[key]] == 0).all()) for key, p in pruned.named_parameters() if key in before)


def test_what_an_encoder_cannot_learn_from_is_refused():
    dense = tiny_encoder("bert")
    pruned = copy.deepcopy(dense)
    tawny.prune(pruned, sparsity=0.5, solver="magnitude", allocator="uniform")
    with pytest.raises(ModelError, match="learns from the dense model alone: give --teacher"):
        tawny.recover(pruned, None, text=tokens(24), **SHORT, kl=0)
    with pytest.raises(RecipeError, match="more than the model's context of 64"):
        tawny.recover(pruned, dense, text=torch.randint(3, 200, (8, 65)), **SHORT)
    seeing = tiny_encoder("vit")
    tawny.prune(seeing, sparsity=0.5, solver="magnitude", calibration=inputs_for(seeing))
    with pytest.raises(ModelError, match="takes pixel_values"):
        tawny.recover(seeing, tiny_encoder("vit"), text=tokens(24), **SHORT)


def test_the_command_line_says_what_an_encoder_lost(run, tmp_path):
    dense, pruned, text = tmp_path / "dense", tmp_path / "pruned", tmp_path / "text.txt"
    tiny_encoder("bert").save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text.write_text("\n\n".join(f"owl {i} sees the field at night and {i * 7} mice" for i in range(400)))
    keys = ["-s", 0.5, "-m", "magnitude", "-a", "uniform", "--calibration", text]
    code, _, err = run("prune", dense, "--out", pruned, *keys)
    assert code == 0, err
    short = ["--seqlen", 16, "--tokens", 512, "--text", text]
    code, out, err = run("recover", pruned, "--teacher", dense, "--out", tmp_path / "out", *short)
    assert code == 0 and "energy lost" in out and "best" in out, err
    code, out, err = run("plan", "recover", pruned, "--teacher", dense, *short)
    assert code == 0 and "about 512 tokens in 32 steps of 1 × 16" in out, err
