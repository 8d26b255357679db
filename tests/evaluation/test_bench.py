from __future__ import annotations

import json

import pytest
import torch

import tawny
from tawny.errors import RecipeError
from tests.decoding.greedy import prune
from tests.encoders import tiny_encoder
from tests.tiny import tiny_model


def test_bench_has_the_agreed_keys_and_plausible_numbers(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    speed = tawny.bench(tmp_path, prompt_tokens=8, tokens=4, rounds=3).to_dict()
    assert {"resident_bytes", "threads", "kernel"} <= set(speed)
    assert speed["file_bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    for key in ("decode", "prefill"):
        low, high = speed[f"{key}_quartiles"]
        assert 0 < low <= speed[f"{key}_tokens_per_second"] <= high
    assert speed["dtype"] == "bfloat16" and speed["threads"] == 1 and speed["packed"] == {}


def test_bench_of_a_live_model_has_no_file_and_refuses_more_than_the_context():
    model = tiny_model("opt")
    assert tawny.bench(model, prompt_tokens=3, tokens=2, rounds=1).file_bytes is None
    with pytest.raises(RecipeError, match="context of 128"):
        tawny.bench(model, prompt_tokens=120, tokens=20)
    with pytest.raises(RecipeError, match="rounds 0"):
        tawny.bench(model, rounds=0)


def test_bench_counts_the_token_it_does_not_time():
    model = tiny_model("gpt2")
    with pytest.raises(RecipeError, match=r"96 \+ 1 \(not timed\) \+ 32 tokens.*context of 128"):
        tawny.bench(model, prompt_tokens=96, tokens=32)
    assert tawny.bench(model, prompt_tokens=95, tokens=32, rounds=1).decoded_tokens == 32


def test_a_packed_folder_is_measured_like_a_dense_one(tmp_path):
    prune(tiny_model("llama", dtype=torch.bfloat16)).save_pretrained(tmp_path / "dense")
    tawny.pack(tmp_path / "dense", tmp_path / "packed")
    dense, packed = (
        tawny.bench(tmp_path / name, prompt_tokens=8, tokens=4, rounds=2) for name in ("dense", "packed")
    )
    assert sum(packed.packed.values()) == 21 and dense.packed == {} and packed.path == dense.path


@pytest.mark.parametrize("make", [lambda: tiny_encoder("bert"), lambda: tiny_model("llama")])
def test_the_verb_answers_in_both_forms(run, tmp_path, make):
    make().save_pretrained(tmp_path)
    words = ("bench", tmp_path, "--prompt-tokens", 8, "--rounds", 1)
    code, out, err = run(*words, "--json")
    assert code == 0 and json.loads(out)["rounds"] == 1, err
    assert "memory" in run(*words)[1]
