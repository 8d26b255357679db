"""What is told of each token: its text, its bytes, and where in the text it stands."""

from __future__ import annotations

import itertools

import pytest

from tawny.serving.answers import Service
from tests.decoding.tokenizers import llama_2_tokenizer
from tests.serving.test_server import CHAT, GREEDY
from tests.serving.tiny import byte_tokenizer, serving
from tests.tiny import endless


@pytest.fixture(scope="module")
def spaced():
    """A tokenizer that drops the space in front of whatever it decodes."""
    return llama_2_tokenizer(["</s>", "▁the", "▁owl", *(f"▁w{number}" for number in range(253))])


def service(tokenizer):
    return Service(endless("llama"), tokenizer, "tiny", 64, 1)


def test_a_space_between_prompt_and_text_is_told_everywhere(spaced):
    with serving(endless("llama"), spaced) as (_, client):
        keys = {**GREEDY, "prompt": "the owl", "max_tokens": 4}
        made = client.completions.create(**keys, echo=True, logprobs=1).choices[0]
        stream = client.completions.create(**keys, stream=True)
        streamed = "".join(chunk.choices[0].text for chunk in stream)
        alone = client.completions.create(**keys, logprobs=1).choices[0]
    told = made.logprobs
    ids = [spaced.convert_tokens_to_ids(word.replace(" ", "▁")) for word in told.tokens]
    assert made.text == spaced.decode(ids) and made.text.startswith("the owl w")
    assert "the owl" + streamed == "the owl" + alone.text == made.text
    assert " " + made.text == "".join(told.tokens)
    ends = itertools.accumulate(map(len, told.tokens), initial=-1)
    assert told.text_offset == [max(0, end) for end in ends][:-1]
    assert alone.logprobs.text_offset == [at - len("the owl") for at in told.text_offset[2:]]


def test_tokens_that_share_a_character_stand_where_it_begins(client):
    made = client.completions.create(**GREEDY, prompt="é🦉🦉 owl", max_tokens=1, echo=True, logprobs=0)
    offsets = made.choices[0].logprobs.text_offset
    assert offsets == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7]


def test_what_the_tokenizer_puts_before_a_text_has_no_place_in_it(spaced):
    assert service(spaced).lengths("the owl", [0, 1, 2]) == [0, 3, 4]
    assert service(spaced).lengths("</s> the owl", [0, 1, 2]) == [4, 4, 4]


def test_the_bytes_of_tokens_make_up_the_text(client):
    made = client.chat.completions.create(**GREEDY, messages=CHAT, max_tokens=24, logprobs=True).choices[0]
    told = [byte for token in made.logprobs.content for byte in token.bytes]
    assert bytes(told).decode(errors="replace") == made.message.content and max(told) > 127


def test_the_bytes_of_a_part_of_a_character_are_those_of_the_vocabulary():
    letters, owl = byte_tokenizer(), "🦉".encode()
    assert [service(letters).bytes_of(token) for token in letters("🦉")["input_ids"]] == [[b] for b in owl]
    named = llama_2_tokenizer(["</s>", *(f"<0x{byte:02X}>" for byte in owl), "▁a", "�"])
    told = [service(named).bytes_of(token) for token in range(1, 7)]
    assert told == [*([b] for b in owl), [32, 97], None]
