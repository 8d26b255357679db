from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tawny
from tawny.errors import NumericalError, RecipeError, TextError
from tests.tiny import FAMILIES, endless, tiny_model, tokens


def own_greedy(model, ids, count):
    """What transformers itself makes of the same prompt."""
    made = model.generate(
        ids.view(1, -1), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(family):
    model = endless(family)
    ids = tokens(1, 7)[0]
    made = tawny.generate(model, ids, max_tokens=12)
    assert made.tokens == own_greedy(model, ids, 12)
    assert (made.finish, made.prompt_tokens, made.text, made.chat) == ("length", 7, "", False)
    assert made.decode_tokens_per_second > 0 and made.first_token_seconds > 0


@pytest.mark.parametrize("family", ["openai-gpt", "rwkv"])
def test_a_model_without_keys_and_values_reads_the_whole_text(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "n_embd": 32, "n_layer": 2}
    sizes |= {"n_head": 2, "attention_hidden_size": 32, "context_length": 64}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    ids, expected = tokens(1, 7)[0] % 64, []
    with torch.no_grad():
        for _ in range(10):
            expected.append(
                int(
                    model(torch.cat([ids, torch.tensor(expected, dtype=torch.long)])[None])
                    .logits[0, -1]
                    .argmax()
                )
            )
    assert tawny.generate(model, ids, max_tokens=10).tokens == expected
    assert tawny.bench(model, prompt_tokens=5, tokens=3, rounds=1).path == "model"


@pytest.mark.parametrize("refusal", [ValueError, AttributeError])
def test_a_model_with_a_cache_of_its_own_gets_that_back(refusal):
    model = endless("llama")
    forward, given = model.forward, []

    def own(input_ids=None, cache=None, **rest):
        if cache is not None and cache not in given:
            raise refusal("it uses a cache of its own")
        made = forward(input_ids=input_ids, cache=cache, **rest)
        given.append(made.cache)
        return made

    ids = tokens(1, 7)[0]
    expected = tawny.generate(model, ids, max_tokens=8).tokens
    model.forward = own
    assert tawny.generate(model, ids, max_tokens=8).tokens == expected


def test_one_text_a_model_at_a_time():
    """The proof of the quick path hooks modules that another thread's text would go through."""
    for seed in range(4):
        model = endless("llama", seed)
        ids = [tokens(1, 7, seed=n)[0] for n in range(3)]
        with ThreadPoolExecutor(3) as pool:
            made = list(
                pool.map(lambda one, model=model: tawny.generate(model, one, max_tokens=12).tokens, ids)
            )
        assert made == [own_greedy(model, one, 12) for one in ids]


def test_a_token_that_ends_the_text_is_not_part_of_it():
    model, ids = endless("llama"), tokens(1, 7)[0]
    free = tawny.generate(model, ids, max_tokens=12).tokens
    stop = free[4]
    model.generation_config.eos_token_id = [stop, 255]
    made = tawny.generate(model, ids, max_tokens=12)
    assert made.finish == "stop" and made.tokens == free[: free.index(stop)]


def test_a_text_ends_where_the_context_does():
    model = endless("llama")
    made = tawny.generate(model, tokens(1, 120)[0], max_tokens=50)
    assert len(made.tokens) == 8 and made.finish == "context"
    with pytest.raises(TextError, match="context is 128"):
        tawny.generate(model, tokens(1, 128)[0])


def test_the_seed_decides_what_is_drawn():
    model = endless("llama")
    ids = tokens(1, 7)[0]
    draw = [tawny.generate(model, ids, max_tokens=16, temperature=3.0, seed=s).tokens for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"max_tokens": 0}, RecipeError, "max_tokens 0"),
        ({"temperature": -1.0}, RecipeError, "temperature -1.0"),
        ({"temperature": math.nan}, RecipeError, "temperature nan"),
        ({"temperature": math.inf}, RecipeError, "temperature inf"),
        ({"top_p": 0.0}, RecipeError, "top_p 0.0"),
        ({"top_p": math.nan}, RecipeError, "top_p nan"),
        ({"threads": 0}, RecipeError, "threads 0"),
    ],
)
def test_an_impossible_wish_is_named(keys, error, words):
    with pytest.raises(error, match=words):
        tawny.generate(tiny_model("llama"), tokens(1, 5)[0], **keys)


def test_a_model_in_training_is_decoded_without_dropout_and_stays_in_training():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    ids = tokens(1, 7)[0]
    calm = tawny.generate(model, ids, max_tokens=8).tokens
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    assert tawny.generate(model, ids, max_tokens=8).tokens == calm
    tawny.bench(model, prompt_tokens=3, tokens=2, rounds=1)
    assert [module.training for module in model.modules()] == modes


def test_an_endless_wish_costs_what_the_text_costs():
    model = tiny_model("bloom")  # has no context
    model.generation_config.eos_token_id = None
    stop = tawny.generate(model, tokens(1, 5)[0], max_tokens=4).tokens[-1]
    model.generation_config.eos_token_id = stop
    assert tawny.generate(model, tokens(1, 5)[0], max_tokens=10**18).finish == "stop"
    with pytest.raises(RecipeError, match="tokens 1000000000000 is not possible"):
        tawny.bench(model, tokens=10**12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_is_told_and_not_an_empty_text(temperature):
    model = tiny_model("llama")
    model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(NumericalError, match="logits hold nan"):
        tawny.generate(model, tokens(1, 5)[0], temperature=temperature)
