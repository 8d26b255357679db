"""What `tawny.stream` promises to whoever reads it, and to whoever stops."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import tawny
from tawny.errors import NumericalError, RecipeError, TextError
from tests.decoding.tokenizers import Bytes
from tests.tiny import endless, tiny_model, tokens

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


def test_packed_and_dense_folders_stream_the_same(tmp_path):
    model = endless("llama")
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
    model.save_pretrained(tmp_path / "dense")
    tawny.pack(tmp_path / "dense", tmp_path / "packed", values="f32")
    made = [
        read(tawny.stream(tmp_path / name, IDS, max_tokens=12, tokenizer=Bytes()))
        for name in ("dense", "packed")
    ]
    assert made[0] == made[1] and len(made[0][0]) == 12


def test_the_last_piece_says_why_the_text_ended():
    model = endless("llama")
    free = read(tawny.stream(model, IDS, max_tokens=12))[0]
    model.generation_config.eos_token_id = stop = free[4]
    assert read(tawny.stream(model, IDS, max_tokens=12)) == (free[: free.index(stop)], "", "stop")
    assert read(tawny.stream(endless("llama"), tokens(1, 126)[0], max_tokens=12))[2] == "context"


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
    model.lm_head.weight.data[3, 0] = torch.nan
    pieces = tawny.stream(model, IDS)
    with pytest.raises(NumericalError, match="logits hold nan"):
        next(pieces)
