"""A tiny model that can be served: a tokenizer of bytes, a chat template with tools."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

import tawny
from tests.tiny import tiny_model

# Marks as many families use them; a call of a tool is JSON between two of them.
TEMPLATE = """\
{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}
<call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</call>
{%- endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a byte, so that one letter may need several; and marks that are no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=marks[0], additional_special_tokens=marks[1:]
    )
    tokenizer.chat_template = template
    return tokenizer


def served_model(seed: int = 0) -> Any:
    """It ends its texts at the tokenizer's end mark, which it nearly never makes."""
    model = tiny_model("llama", seed, vocab_size=264, max_position_embeddings=1024)
    model.generation_config.eos_token_id = model.config.eos_token_id = 256
    return model


@contextmanager
def serving(model: Any, tokenizer: Any, **keys: Any) -> Iterator[tuple[tawny.Server, openai.OpenAI]]:
    """A server of its own, and a client that asks once."""
    key = keys.get("api_key", "none")
    with (
        tawny.serve(model, tokenizer=tokenizer, name="tiny", **keys) as server,
        openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=60) as client,
    ):
        yield server, client


@contextmanager
def connected(server: tawny.Server, text: str) -> Iterator[socket.socket]:
    """A connection that has sent a text, with the server's name for HOST."""
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(text.replace("HOST", host).encode())
        yield connection
