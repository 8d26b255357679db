from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tawny
from tawny.decoding.decoder import Decoder, kernels
from tawny.errors import CheckpointError, NumericalError, RecipeError, TextError, UserError
from tawny.evaluation.bench import _Choice, _Text
from tawny.packed.linear import DenseLinear
from tests.tiny import FAMILIES, tiny_model, tokens


def own_greedy(model, ids, count):
    """What transformers itself makes of the same prompt."""
    made = model.generate(
        ids.view(1, -1), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(family):
    model = tiny_model(family)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
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
    model = tiny_model("llama")
    forward, given = model.forward, []

    def own(input_ids=None, past_key_values=None, **rest):
        if past_key_values is not None and past_key_values not in given:
            raise refusal("it uses a cache of its own")
        made = forward(input_ids=input_ids, past_key_values=past_key_values, **rest)
        given.append(made.past_key_values)
        return made

    ids = tokens(1, 7)[0]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    expected = tawny.generate(model, ids, max_tokens=8).tokens
    model.forward = own
    assert tawny.generate(model, ids, max_tokens=8).tokens == expected


def test_one_text_a_model_at_a_time():
    """The proof of the quick path hooks modules that another thread's text would go through."""
    for seed in range(4):
        model = tiny_model("llama", seed)
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        ids = [tokens(1, 7, seed=n)[0] for n in range(3)]
        with ThreadPoolExecutor(3) as pool:
            made = list(
                pool.map(lambda one, model=model: tawny.generate(model, one, max_tokens=12).tokens, ids)
            )
        assert made == [own_greedy(model, one, 12) for one in ids]


def test_a_token_that_ends_the_text_is_not_part_of_it():
    model = tiny_model("llama")
    ids = tokens(1, 7)[0]
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    free = tawny.generate(model, ids, max_tokens=12).tokens
    stop = free[4]
    model.generation_config.eos_token_id = [stop, 255]
    made = tawny.generate(model, ids, max_tokens=12)
    assert made.finish == "stop" and made.tokens == free[: free.index(stop)]


def test_a_text_ends_where_the_context_does():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    made = tawny.generate(model, tokens(1, 120)[0], max_tokens=50)
    assert len(made.tokens) == 8 and made.finish == "context"
    with pytest.raises(TextError, match="context is 128"):
        tawny.generate(model, tokens(1, 128)[0])


def test_the_seed_decides_what_is_drawn():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    ids = tokens(1, 7)[0]
    draw = [tawny.generate(model, ids, max_tokens=16, temperature=3.0, seed=s).tokens for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_top_p_leaves_the_likeliest():
    logits = torch.tensor([0.0, 5.0, 4.0, -1.0])
    assert {_Choice(1.0, 0.5, seed)(logits) for seed in range(20)} == {1}
    assert {_Choice(1.0, 0.9, seed)(logits) for seed in range(40)} == {1, 2}


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 1e-45, 5e-324, 1e-3):
        assert _Choice(temperature, 1.0, 0)(logits) == int(logits.argmax()), temperature
        assert _Choice(temperature, 0.9, 0)(logits) == int(logits.argmax()), temperature


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


def test_a_text_needs_a_tokenizer_and_a_chat_a_template():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="tokenizer="):
        tawny.generate(model, "hello")
    with pytest.raises(TextError, match="no token"):
        tawny.generate(model, torch.tensor([], dtype=torch.long))

    class Bare:
        chat_template = None

    with pytest.raises(CheckpointError, match="no chat template"):
        tawny.generate(model, "hello", tokenizer=Bare(), chat=True)


class Bytes:
    """A tokenizer whose tokens are bytes, so that one letter may need several."""

    chat_template = "there is one"
    eos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        return f"<{turns[0]['content']}>"

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces  # it would change what has been said
        return bytes(ids).decode(errors="replace")


def test_streamed_pieces_are_whole_letters_and_make_up_the_text():
    pieces: list[str] = []
    text = _Text(Bytes(), pieces.append)
    said = "owl – 猫頭鷹\n夜 and\nmore"
    for token in said.encode():
        text.add(token)
    assert text.finish() == said == "".join(pieces)
    assert not any("�" in piece for piece in pieces) and len(pieces) > 10


def llama_2_tokenizer(words):
    """One that writes spaces as ▁ and bytes as <0x0A>, and drops a space from the front of what it decodes."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", clean_up_tokenization_spaces=False
    )


def test_streamed_lines_keep_the_spaces_they_begin_with():
    said = ["▁def", "▁f", "():", "<0x0A>", "▁▁▁▁▁▁▁", "▁x", "<0x0A>", "</s>", "▁y", "<0x0A>", "<0x0A>", "▁z"]
    words = list(dict.fromkeys(["</s>", *said]))
    pieces: list[str] = []
    text = _Text(llama_2_tokenizer(words), pieces.append)
    for word in said:
        text.add(words.index(word))
    assert text.finish() == "".join(pieces) == "def f():\n        x\n y\n\n z"


def test_the_chat_template_is_used_when_there_is_one():
    model = tiny_model("llama")
    made = {chat: tawny.generate(model, "hi", tokenizer=Bytes(), chat=chat) for chat in (None, True, False)}
    assert [made[c].prompt_tokens for c in (None, True, False)] == [4, 4, 2]
    assert made[None].chat and not made[False].chat


def test_a_prompt_of_tokens_is_one_prompt():
    model, ids = tiny_model("llama"), tokens(1, 5)
    assert (
        tawny.generate(model, ids, max_tokens=3).tokens == tawny.generate(model, ids[0], max_tokens=3).tokens
    )
    with pytest.raises(TextError, match=r"shape \[2, 5\]; give one prompt"):
        tawny.generate(model, tokens(2, 5))


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


def test_our_kernels_are_only_there_inside():
    model = tiny_model("llama")
    before = [type(m) for m in model.modules()]
    with kernels(model):
        assert any(isinstance(m, DenseLinear) for m in model.modules())
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("quick", [None, False])
def test_memory_grows_with_the_text(quick):
    model, ids = tiny_model("llama"), tokens(1, 40)[0]
    with torch.inference_mode(), kernels(model):
        made = []
        for reserve in (None, 9, 5):
            decoder = Decoder(model, 40, quick, reserve)
            decoder.prefill(ids[:6])
            made.append(torch.stack([decoder.step(int(token)).clone() for token in ids[6:]]))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_an_endless_wish_costs_what_the_text_costs():
    model = tiny_model("bloom")  # has no context
    model.generation_config.eos_token_id = None
    stop = tawny.generate(model, tokens(1, 5)[0], max_tokens=4).tokens[-1]
    model.generation_config.eos_token_id = stop
    assert tawny.generate(model, tokens(1, 5)[0], max_tokens=10**18).finish == "stop"
    with pytest.raises(RecipeError, match="tokens 1000000000000 is not possible"):
        tawny.bench(model, tokens=10**12)


def test_a_prompt_the_model_cannot_read_is_named():
    model = tiny_model("llama")
    for wrong in (torch.tensor([3, 999]), torch.tensor([-1])):
        with pytest.raises(TextError, match="token id"):
            tawny.generate(model, wrong)
    with pytest.raises(TextError, match=r"torch\.float32; give token ids"):
        tawny.generate(model, torch.tensor([1.0]))
    with pytest.raises(TextError, match=r"not valid UTF-8 \(at character 2\)"):
        tawny.generate(model, "a\udcffb", tokenizer=Bytes())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_is_told_and_not_an_empty_text(temperature):
    model = tiny_model("llama")
    model.lm_head.weight.data[3, 0] = math.nan
    with pytest.raises(NumericalError, match="logits hold nan"):
        tawny.generate(model, tokens(1, 5)[0], temperature=temperature)


def test_a_full_decoder_says_so():
    model = tiny_model("llama")
    with torch.inference_mode():
        decoder = Decoder(model, 6)
        decoder.prefill(tokens(1, 5)[0])
        decoder.step(4)
        with pytest.raises(UserError, match="room for"):
            decoder.step(4)


def test_bench_has_the_agreed_keys_and_plausible_numbers(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    speed = tawny.bench(tmp_path, prompt_tokens=8, tokens=4, rounds=3).to_dict()
    wanted = {
        "decode_tokens_per_second",
        "prefill_tokens_per_second",
        "resident_bytes",
        "file_bytes",
        "threads",
        "kernel",
    }
    assert wanted <= set(speed)
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


def test_a_packed_folder_is_decoded_and_measured_like_a_dense_one(tmp_path):
    model = tiny_model("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
    model.save_pretrained(tmp_path / "dense")
    tawny.pack(tmp_path / "dense", tmp_path / "packed")
    dense, packed = (
        tawny.bench(tmp_path / name, prompt_tokens=8, tokens=4, rounds=2) for name in ("dense", "packed")
    )
    assert sum(packed.packed.values()) == 21 and dense.packed == {} and packed.path == dense.path
    ids = tokens(1, 7)[0]
    made = [tawny.generate(tawny.load(tmp_path / name), ids, max_tokens=8) for name in ("dense", "packed")]
    assert made[0].prompt_tokens == made[1].prompt_tokens == 7 and len(made[1].tokens) == len(made[0].tokens)
