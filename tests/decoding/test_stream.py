"""What `tawny.stream` promises to whoever reads it and to whoever stops, and `tawny.generate` to whoever waits."""

from __future__ import annotations

import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tawny
from tawny.errors import NumericalError, RecipeError, TextError
from tests.decoding.greedy import prune
from tests.decoding.tokenizers import Bytes, llama_2_tokenizer
from tests.tiny import FAMILIES, endless, tiny_model, tokens

IDS = tokens(1, 7)[0]


def read(pieces):
    """Tokens, text and why it ended."""
    *made, last = pieces
    assert last.token is None and last.finish and not any(piece.finish for piece in made)
    return [piece.token for piece in made], "".join(piece.text for piece in (*made, last)), last.finish


@pytest.mark.parametrize("keys", [{}, {"temperature": 3.0, "top_p": 0.9, "seed": 5}])
def test_a_stream_makes_what_generate_makes(keys):
    model = endless("llama")
    whole = tawny.generate(model, "owl", max_tokens=40, tokenizer=Bytes(), **keys)
    made = read(tawny.stream(model, "owl", max_tokens=40, tokenizer=Bytes(), **keys))
    assert made == (whole.tokens, whole.text, whole.finish) and made[2] == "length"


def test_a_text_keeps_the_space_that_it_begins_with_and_an_answer_does_not():
    tokenizer = llama_2_tokenizer(["</s>", "▁the", "▁owl", *(f"▁w{number}" for number in range(253))])
    tokenizer.chat_template = "the owl"
    model = endless("llama")
    for chat, cut in ((False, 0), (True, 1)):
        made = tawny.generate(model, "the owl", max_tokens=4, chat=chat, tokenizer=tokenizer)
        whole = tokenizer.decode([1, 2, *made.tokens]).removeprefix("the owl")
        assert made.text == whole[cut:] and whole.startswith(" w")


def test_packed_and_dense_folders_stream_the_same(tmp_path):
    prune(endless("llama")).save_pretrained(tmp_path / "dense")
    tawny.pack(tmp_path / "dense", tmp_path / "packed", values="f32")
    keys = {"max_tokens": 12, "tokenizer": Bytes()}
    made = [read(tawny.stream(tmp_path / name, IDS, **keys)) for name in ("dense", "packed")]
    assert made[0] == made[1] and len(made[0][0]) == 12


def test_the_last_piece_says_why_the_text_ended():
    model = endless("llama")
    free = read(tawny.stream(model, IDS, max_tokens=12))[0]
    for stop in (free[4], [free[4], 255]):  # which is not part of the text
        model.generation_config.eos_token_id = stop
        assert read(tawny.stream(model, IDS, max_tokens=12)) == (free[: free.index(free[4])], "", "stop")
    full = tawny.generate(endless("llama"), tokens(1, 120)[0], max_tokens=50)
    assert len(full.tokens) == 8 and full.finish == "context"


def test_closing_a_stream_gives_the_model_back_and_frees_its_keys():
    model = endless("llama").train()
    types = [type(module) for module in model.modules()]
    pieces = tawny.stream(model, IDS, max_tokens=10**6)
    next(pieces), next(pieces)
    cache = weakref.ref(pieces.gi_frame.f_locals["decoder"].cache)
    assert [type(module) for module in model.modules()] != types and not model.training
    gc.disable()
    try:
        pieces.close()
        assert cache() is None
    finally:
        gc.enable()
    assert [type(module) for module in model.modules()] == types and model.training
    assert list(pieces) == []


def test_closing_a_stream_frees_the_model_that_was_opened_for_it(tmp_path):
    endless("llama").save_pretrained(tmp_path)
    pieces = tawny.stream(tmp_path, IDS, tokenizer=Bytes())
    next(pieces)
    opened = weakref.ref(pieces.gi_frame.f_locals["model"].model.layers[0].mlp.up_proj.weight)
    assert opened() is not None
    pieces.close()
    del pieces
    gc.collect()
    assert opened() is None


def test_a_stream_that_is_dropped_inside_a_letter_gives_no_half_of_it():
    """A client may go away at any token; what it has been given is valid text all the same."""
    said = "猫頭鷹".encode()
    tokenizer, model = Bytes(), scripted(said)
    for count in range(1, len(said) + 1):
        pieces = tawny.stream(model, "a", chat=False, max_tokens=len(said), tokenizer=tokenizer)
        given = [next(pieces) for _ in range(count)]
        pieces.close()
        assert [piece.token for piece in given] == list(said[:count])
        assert "".join(piece.text for piece in given) == "猫頭鷹"[: count // 3]


def test_what_stays_incomplete_comes_with_the_last_piece():
    said = "é猫".encode()[:-1]
    made = list(tawny.stream(scripted(said), "a", chat=False, max_tokens=len(said), tokenizer=Bytes()))
    assert [piece.text for piece in made] == ["", "é", "", "", "�"]


def scripted(said: bytes):
    """A model that says these bytes after the one byte of its prompt."""
    model = endless("llama")

    def say(module, args, kwargs, output):
        at = kwargs["cache"].get_seq_length() - 1
        output.logits[..., said[at]] = 1000.0
        return output

    model.register_forward_hook(say, with_kwargs=True)
    return model


def test_streams_of_one_model_may_take_turns():
    model, prompts = endless("llama"), list(tokens(3, 7))
    alone = [read(tawny.stream(model, ids, max_tokens=10))[0] for ids in prompts]
    streams = [tawny.stream(model, ids, max_tokens=10) for ids in prompts]
    rounds = list(zip(*streams, strict=True))
    assert [[piece.token for piece in made[:-1]] for made in zip(*rounds, strict=True)] == alone
    assert not any(type(module).__name__ == "DenseLinear" for module in model.modules())


def test_nothing_of_torch_is_changed_between_pieces():
    before = torch.get_num_threads()
    pieces = tawny.stream(endless("llama"), IDS, max_tokens=3, threads=before + 1)
    for _ in pieces:
        assert torch.get_num_threads() == before and not torch.is_inference_mode_enabled()


def test_messages_go_through_the_chat_template():
    model = endless("llama")
    keys = {"max_tokens": 6, "tokenizer": Bytes()}
    chat = [{"role": "user", "content": "hi"}]
    assert read(tawny.stream(model, chat, **keys)) == read(tawny.stream(model, "hi", **keys))
    assert tawny.generate(model, chat, **keys).chat
    with pytest.raises(TextError, match=r"keys \['text'\]; give role and content"):
        tawny.stream(model, [{"text": "hi"}], **keys)


def test_a_template_that_refuses_messages_is_told():
    from jinja2 import TemplateError

    class Strict(Bytes):
        def apply_chat_template(self, conversation, **keys):
            raise TemplateError("roles must alternate")

    with pytest.raises(TextError, match="refuses the messages: roles must alternate"):
        tawny.stream(tiny_model("llama"), "hi", tokenizer=Strict())


def test_what_is_wrong_is_told_before_the_first_piece():
    model = endless("llama")
    with pytest.raises(RecipeError, match="max_tokens 0"):
        tawny.stream(model, IDS, max_tokens=0)
    with pytest.raises(TextError, match="context is 128"):
        tawny.stream(model, tokens(1, 128)[0])


# --- a whole text ---------------------------------------------------------------------------------------------


def own_greedy(model, ids, count):
    """What transformers itself makes of the same prompt."""
    made = model.generate(
        ids.view(1, -1), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(family):
    model = endless(family)
    made = tawny.generate(model, IDS, max_tokens=12)
    assert made.tokens == own_greedy(model, IDS, 12)
    assert (made.finish, made.prompt_tokens, made.text, made.chat) == ("length", 7, "", False)
    assert made.decode_tokens_per_second > 0 and made.first_token_seconds > 0


@pytest.mark.parametrize("window", [None, 99])
def test_a_text_that_outgrows_its_rotary_angles_is_read_again(window):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    # Transformers reads again only where the configuration says it, too.
    keys = {"rope_parameters": rope, "original_max_position_embeddings": 16, "sliding_window": window}
    model = tiny_model("phi3", **keys)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    for count in (6, 7, 8, 30):
        assert tawny.generate(model, IDS, max_tokens=count).tokens == own_greedy(model, IDS, count)


@pytest.mark.parametrize("family", ["openai-gpt", "rwkv"])
def test_a_model_without_keys_and_values_reads_the_whole_text(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "n_embd": 32, "n_layer": 2}
    sizes |= {"n_head": 2, "attention_hidden_size": 32, "context_length": 64}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    ids = read = IDS % 64
    with torch.no_grad():
        for _ in range(10):
            read = torch.cat([read, model(read[None]).logits[0, -1:].argmax(-1)])
    assert tawny.generate(model, ids, max_tokens=10).tokens == read[len(ids) :].tolist()
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

    expected = tawny.generate(model, IDS, max_tokens=8).tokens
    model.forward = own
    assert tawny.generate(model, IDS, max_tokens=8).tokens == expected


def test_one_text_a_model_at_a_time():
    """The proof of the quick path hooks modules that another thread's text would go through."""
    for seed in range(4):
        model = endless("llama", seed)
        ids = [tokens(1, 7, seed=n)[0] for n in range(3)]
        with ThreadPoolExecutor(3) as pool:
            texts = [pool.submit(tawny.generate, model, one, max_tokens=12) for one in ids]
        assert [text.result().tokens for text in texts] == [own_greedy(model, one, 12) for one in ids]


def test_the_seed_decides_what_is_drawn():
    model = endless("llama")
    draw = [tawny.generate(model, IDS, max_tokens=16, temperature=3.0, seed=s).tokens for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "max_tokens": [0],
        "temperature": [-1.0, math.nan, math.inf],
        "top_p": [0.0, math.nan],
        "threads": [0],
    }.items(),
)
def test_an_impossible_wish_is_named(key, values):
    for value in values:
        with pytest.raises(RecipeError, match=f"{key} {value}"):
            tawny.generate(tiny_model("llama"), IDS, **{key: value})


def test_a_model_in_training_is_decoded_without_dropout_and_stays_in_training():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    calm = tawny.generate(model, IDS, max_tokens=8).tokens
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    assert tawny.generate(model, IDS, max_tokens=8).tokens == calm
    tawny.bench(model, prompt_tokens=3, tokens=2, rounds=1)
    assert [module.training for module in model.modules()] == modes


def test_an_endless_wish_costs_what_the_text_costs():
    model = tiny_model("bloom")  # has no context
    model.generation_config.eos_token_id = None
    stop = tawny.generate(model, IDS, max_tokens=4).tokens[-1]
    model.generation_config.eos_token_id = stop
    assert tawny.generate(model, IDS, max_tokens=10**18).finish == "stop"
    with pytest.raises(RecipeError, match="tokens 1000000000000 is not possible"):
        tawny.bench(model, tokens=10**12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_is_told_and_not_an_empty_text(temperature):
    model = tiny_model("llama")
    model.lm_head.weight.data[3, 0] = math.nan
    pieces = tawny.stream(model, IDS, temperature=temperature)
    with pytest.raises(NumericalError, match="logits hold nan"):
        next(pieces)
