from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tawny
from tawny.decoding.text import StopStrings, TextPieces, check_prompt, decode
from tawny.errors import CheckpointError, TextError, UserError
from tests.decoding.tokenizers import Bytes, llama_2_tokenizer
from tests.tiny import tiny_model, tokens


def test_streamed_pieces_are_whole_letters_and_make_up_the_text():
    said, text = "owl – 猫頭鷹\n夜 and\nmore", TextPieces(Bytes())
    pieces = [piece for token in said.encode() if (piece := text.add(token))]
    assert said == "".join(pieces) and text.rest() == ""
    assert not any("�" in piece for piece in pieces) and len(pieces) > 10


def test_streamed_lines_keep_the_spaces_they_begin_with():
    said = ["▁def", "▁f", "():", "<0x0A>", "▁▁▁▁▁▁▁", "▁x", "<0x0A>", "</s>", "▁y", "<0x0A>", "<0x0A>", "▁z"]
    words = list(dict.fromkeys(["</s>", *said]))
    tokenizer, ids = llama_2_tokenizer(words), [words.index(word) for word in said]
    text = TextPieces(tokenizer)
    pieces = [*map(text.add, ids), text.rest()]
    assert decode(tokenizer, ids) == "".join(pieces) == "def f():\n        x\n y\n\n z"


LETTERS = ["</s>", "▁", "▁the", "▁owl", "s", "<0x0A>", *(f"<0x{byte:02X}>" for byte in "🦉é".encode())]
OWLS = llama_2_tokenizer(LETTERS)
parts = st.lists(st.sampled_from([[0], [1], [2], [3], [4], [5], [6, 7, 8, 9], [10, 11]]), max_size=50)


@given(parts, parts)
def test_a_text_continues_its_prompt_with_the_spaces_that_decoders_drop(prompt, made):
    prompt, made = ([token for part in parts for token in part] for parts in (prompt, made))
    text = TextPieces(OWLS, after=prompt)
    said = decode(OWLS, prompt) + "".join(map(text.add, made)) + text.rest()
    assert said == decode(OWLS, prompt + made)


def test_a_character_whose_first_half_is_in_the_prompt_stays_broken():
    *before, last = "a🦉".encode()
    text = TextPieces(Bytes(), after=before)
    assert text.add(last) + text.add(ord("b")) == "�b"


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


def test_the_chat_template_is_used_when_there_is_one():
    model = tiny_model("llama")
    made = {chat: tawny.generate(model, "hi", tokenizer=Bytes(), chat=chat) for chat in (None, True, False)}
    assert [made[c].prompt_tokens for c in (None, True, False)] == [4, 4, 2]
    assert made[None].chat and not made[False].chat


def test_a_prompt_of_tokens_is_one_prompt():
    model, ids = tiny_model("llama"), tokens(1, 5)
    one, other = (tawny.generate(model, given, max_tokens=3).tokens for given in (ids, ids[0]))
    assert one == other
    with pytest.raises(TextError, match=r"shape \[2, 5\]; give one prompt"):
        tawny.generate(model, tokens(2, 5))


def test_a_prompt_the_model_cannot_read_is_named():
    model = tiny_model("llama")
    for wrong in (torch.tensor([3, 999]), torch.tensor([-1])):
        with pytest.raises(TextError, match="token id"):
            tawny.generate(model, wrong)
    with pytest.raises(TextError, match=r"torch\.float32; give token ids"):
        tawny.generate(model, torch.tensor([1.0]))
    with pytest.raises(TextError, match=r"not valid UTF-8 \(at character 2\)"):
        tawny.generate(model, "a\udcffb", tokenizer=Bytes())


@given(st.lists(st.text("abc", max_size=3)), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string_wherever_it_is_cut(pieces, strings):
    stops, whole = StopStrings(strings), "".join(pieces)
    given_out = ""
    for count, piece in enumerate(pieces, 1):
        given_out += stops.add(piece)
        read = "".join(pieces[:count])
        assert stops.found == any(string in read for string in strings)
        if stops.found:
            # The string that is whole first ends the text; of several, the one that begins first.
            assert given_out == read[: min(at for s in strings if (at := read.find(s)) >= 0)]
            assert stops.add(piece) == ""
            return
        held = read[len(given_out) :]
        assert read.startswith(given_out) and (not held or any(s.startswith(held) for s in strings))
    assert given_out + stops.rest() == whole


@pytest.mark.parametrize("prompt", [None, 5, [1, 2, 3], ["Hello"], {"input_ids": [1]}])
def test_what_is_no_prompt_is_refused_in_one_line(prompt):
    with pytest.raises(TextError, match="give a text, messages with role and content, or token ids"):
        check_prompt(prompt)
