"""The server, asked by the `openai` client and by plain sockets. Nothing is mocked."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import openai
import pydantic
import pytest
import torch

import tawny
from tawny.errors import UserError
from tawny.progress import Silent
from tawny.serving.web import Connection
from tawny.words import size
from tests.serving.tiny import byte_tokenizer, connected, served_model, serving
from tests.tiny import BAMBA, tiny_model

CHAT = [{"role": "user", "content": "Héllo"}]
GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def said(model, tokenizer):
    """What `tawny.generate` says to the same messages."""
    return tawny.generate(model, CHAT, tokenizer=tokenizer, max_tokens=24)


def read(stream):
    """Text, why it ended, and usage of a streamed chat."""
    chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and choices[0].delta.role == "assistant"
    assert all(choice.finish_reason is None for choice in choices[:-1])
    return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason, chunks[-1].usage


# --- what is answered --------------------------------------------------------------------------------------------


def test_a_chat_is_what_generate_makes_streamed_or_whole(client, said):
    whole = client.chat.completions.create(**GREEDY, messages=CHAT, max_tokens=24)
    text, finish, usage = read(
        client.chat.completions.create(
            **GREEDY,
            messages=CHAT,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert whole.choices[0].message.content == text == said.text
    assert whole.choices[0].finish_reason == finish == said.finish == "length"
    assert whole.usage.prompt_tokens == usage.prompt_tokens == said.prompt_tokens
    assert whole.usage.completion_tokens == usage.completion_tokens == 24
    # The second time all but the last token is in the prefix cache.
    assert usage.prompt_tokens_details.cached_tokens == said.prompt_tokens - 1


def test_many_at_once_are_each_what_they_are_alone(server, model, tokenizer):
    texts = ("Héllo", "owl", "Rome", "What is 2?", "ships", "é🦉")
    asked = [[{"role": "user", "content": text}] for text in texts]
    said = [tawny.generate(model, each, tokenizer=tokenizer, max_tokens=24).text for each in asked]
    assert len(set(said)) == len(texts)

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            create = partial(client.chat.completions.create, **GREEDY, max_tokens=24)
            whole = [create(messages=each) for each in asked[:3]]
            streamed = [create(messages=each, stream=True) for each in asked[3:]]

            async def text(stream):
                return "".join([c.choices[0].delta.content or "" async for c in await stream])

            made = await asyncio.gather(*whole, *map(text, streamed))
            return [m if isinstance(m, str) else m.choices[0].message.content for m in made]

    assert asyncio.run(ask()) == said


def test_prompts_of_every_kind_are_continued(client, model, tokenizer):
    ids = tokenizer("owl")["input_ids"]
    alone = tawny.generate(model, "owl", chat=False, tokenizer=tokenizer, max_tokens=5).text
    for prompt, count in (("owl", 1), (["owl", "owl"], 2), (ids, 1), ([ids, ids], 2)):
        made = client.completions.create(**GREEDY, prompt=prompt, max_tokens=5)
        assert [c.text for c in made.choices] == [alone] * count
        assert made.usage.prompt_tokens == 3 * count and made.usage.completion_tokens == 5 * count
    echoed = client.completions.create(**GREEDY, prompt="owl", max_tokens=5, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in echoed) == "owl" + alone


def test_likelihoods_of_prompt_and_text_are_the_models(client, model, tokenizer):
    made = client.completions.create(**GREEDY, prompt="owls", max_tokens=1, logprobs=2, echo=True).choices[0]
    ids = tokenizer("owls")["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    told = made.logprobs
    assert told.tokens[:4] == list("owls") and told.text_offset == [0, 1, 2, 3, 4]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    for at, token in enumerate(ids[1:]):
        assert told.token_logprobs[at + 1] == pytest.approx(float(logs[at, token]), abs=1e-4)
        assert max(told.top_logprobs[at + 1].values()) == pytest.approx(float(logs[at].max()), abs=1e-4)
    assert told.token_logprobs[4] == pytest.approx(float(logs[3].max()), abs=1e-4)
    none = client.completions.create(**GREEDY, prompt="owls", max_tokens=0, logprobs=0, echo=True).choices[0]
    assert none.text == "owls" and none.logprobs.token_logprobs == told.token_logprobs[:4]
    # One that scores texts drops the last token, whatever it is; so an end token must be there.
    end = {str(tokenizer.eos_token_id): 100}
    ended = client.completions.create(
        **GREEDY, prompt="owls", max_tokens=1, logprobs=1, echo=True, logit_bias=end
    ).choices[0]
    assert ended.logprobs.tokens == [*"owls", "<|end|>"] and ended.text == "owls"
    assert ended.finish_reason == "stop" and ended.logprobs.token_logprobs[:4] == told.token_logprobs[:4]
    chat = client.chat.completions.create(
        **GREEDY, messages=CHAT, max_tokens=2, logprobs=True, top_logprobs=3
    )
    told = chat.choices[0].logprobs.content
    assert len(told) == 2 and all(
        t.logprob == t.top_logprobs[0].logprob and len(t.top_logprobs) == 3 for t in told
    )


def test_the_seed_decides_and_choices_differ(client):
    keys = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "temperature": 2, "n": 3}
    made = [client.chat.completions.create(**keys, seed=seed) for seed in (1, 1, 2)]
    texts = [[choice.message.content for choice in one.choices] for one in made]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
    assert made[0].usage.completion_tokens == 24 and made[0].usage.prompt_tokens < 24


def test_a_stop_string_is_no_part_of_the_text(client, said):
    stop = said.text[4:7]
    made = client.chat.completions.create(**GREEDY, messages=CHAT, max_tokens=24, stop=[stop, "never"])
    assert made.choices[0].message.content == said.text[: said.text.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    asked = {**GREEDY, "messages": CHAT, "max_tokens": 24, "stop": stop, "stream": True}
    text, finish, _ = read(client.chat.completions.create(**asked))
    assert (text, finish) == (made.choices[0].message.content, "stop")


def test_json_of_a_schema_is_that(client):
    schema = {
        "type": "object",
        "properties": {"owl": {"enum": ["barn", "tawny"]}, "age": {"type": "integer", "maximum": 20}},
        "required": ["owl", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "owl", "schema": schema, "strict": True}}
    for seed in range(3):
        made = client.chat.completions.create(
            model="tiny", messages=CHAT, seed=seed, max_tokens=200, response_format=form
        ).choices[0]
        owl = json.loads(made.message.content)
        assert owl["owl"] in ("barn", "tawny") and owl["age"] <= 20 and made.finish_reason == "stop"

    class Owl(pydantic.BaseModel):
        kind: Literal["barn", "tawny"]

    made = client.chat.completions.parse(model="tiny", messages=CHAT, max_tokens=200, response_format=Owl)
    assert made.choices[0].message.parsed.kind in ("barn", "tawny")
    made = client.chat.completions.create(
        **GREEDY, messages=CHAT, max_tokens=2, response_format={"type": "json_object"}
    )
    assert made.choices[0].message.content.startswith("{")


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_tools_are_called_in_the_templates_format(client):
    keys = {"model": "tiny", "messages": CHAT, "max_tokens": 300, "seed": 3, "parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        made = client.chat.completions.create(**keys, tools=[TOOL], tool_choice=choice).choices[0]
        (call,) = made.message.tool_calls
        assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)  # templates of Mistral refuse others
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
        assert made.finish_reason == "tool_calls" and made.message.content is None
    stream = client.chat.completions.create(**keys, tools=[TOOL], tool_choice=named, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert call.function.name == "weather" and chunks[-1].finish_reason == "tool_calls"
    # What the tool said goes back through the template.
    call = named | {"id": "a", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    answer = {"role": "tool", "tool_call_id": "a", "content": "rain"}
    history = [*CHAT, {"role": "assistant", "tool_calls": [call]}, answer]
    made = client.chat.completions.create(
        **GREEDY, messages=history, tools=[TOOL], tool_choice="none", max_tokens=2
    )
    assert made.choices[0].message.tool_calls is None


def test_what_the_client_was_given_can_be_sent_back(client):
    tool = {"type": "function", "function": TOOL["function"] | {"strict": True}}
    keys = {"model": "tiny", "max_tokens": 300, "seed": 3, "tools": [tool], "parallel_tool_calls": False}
    with client.chat.completions.stream(messages=CHAT, **keys, tool_choice="required") as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    assert call.function.parsed_arguments["city"] in ("Oslo", "Rome")
    history = [*CHAT, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    made = client.chat.completions.create(messages=history, **keys, tool_choice="none")
    assert made.choices[0].message.content


@pytest.mark.parametrize("unknown", [{"uniqueItems": True}, {"items": {"type": "string", "format": "path"}}])
def test_what_a_form_cannot_hold_is_left_out_unless_it_is_strict(client, unknown):
    places = {"type": "array", "maxItems": 2, "items": {"enum": ["Oslo", "Rome"]}, **unknown}
    schema = {"type": "object", "properties": {"places": places}, "required": ["places"]}
    schema |= {"additionalProperties": False}

    def asked(strict):
        function = {"name": "weather", "parameters": schema, "strict": strict}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": strict}}
        keys = {"model": "tiny", "messages": CHAT, "max_tokens": 300, "seed": 3}
        return [
            partial(client.chat.completions.create, **keys, response_format=form),
            partial(
                client.chat.completions.create,
                **keys,
                tools=[{"type": "function", "function": function}],
                tool_choice="required",
            ),
        ]

    answer, called = (ask().choices[0].message for ask in asked(False))
    assert all("places" in json.loads(x) for x in (answer.content, called.tool_calls[0].function.arguments))
    for refused in asked(True):
        with pytest.raises(openai.BadRequestError, match="describes what cannot be followed"):
            refused()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "no token may come next (NoExtensionBias); does a $ref lead only to itself?"),
        ({"$ref": "#/$defs/a", "$defs": {"b": {}}}, "Pointer '/$defs/a' does not exist"),
        (
            {"type": "string", "pattern": "(?=a)b"},
            "regex parse error: look-around, including look-ahead and look-behind, is not supported",
        ),
        (
            {"type": "string", "minLength": 5, "maxLength": 2},
            "Unsatisfiable schema: minLength (5) is greater than maxLength (2)",
        ),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_in_a_sentence(client, schema, reason):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=CHAT, response_format=form)
    expected = f"'response_format' describes what cannot be followed: {reason}"
    assert caught.value.body["message"] == expected and caught.value.body["param"] == "response_format"


def test_what_is_served_is_told(server, client):
    assert [one.id for one in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    status, body = ask(server, "GET", "/health")
    assert status == 200 and json.loads(body)["status"] == "ok"
    client.completions.create(**GREEDY, prompt="owl", max_tokens=2)
    page = ask(server, "GET", "/metrics")[1].decode()
    assert 'tawny_requests_total{finish="length"}' in page and "tawny_first_token_seconds_count" in page
    status, page = ask(server, "GET", "/")
    assert status == 200 and b"<!doctype html>" in page.lower()


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"store": True}, 400, "'store' is not supported"),
        ({"best_of": 2}, 400, "'best_of' is not supported"),
        ({"temperature": 3}, 400, "'temperature'.*less than or equal to 2"),
        ({"max_tokens": "5"}, 400, "'max_tokens'.*valid integer"),
        ({"repetition_penalty": 1e-320}, 400, "'repetition_penalty'.*greater than or equal to 0.01"),
        ({"n": 100}, 400, "100 texts in one request are more than the 7"),
        ({"model": "gpt-4"}, 404, "'gpt-4' is not served here; 'tiny' is"),
        ({"logit_bias": {"99999": 1}}, 400, "token 99999 of 264"),
        ({"messages": []}, 400, "'messages'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'image_url' is not supported"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "tokens and the context is 1024"),
        ({"messages": [{"role": "user", "content": "x" * 10**6}]}, 400, "1000004 characters"),
        ({"stream_options": {}}, 400, "stream_options need stream"),
        ({"tool_choice": "auto"}, 400, "tool_choice needs tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "owl"}}}}, 400, "'response_format'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(client, more, status, said):
    body = {"model": "tiny", "messages": CHAT} | {k: v for k, v in more.items() if k in ("model", "messages")}
    rest = {k: v for k, v in more.items() if k not in body}
    with pytest.raises(openai.APIStatusError, match=said) as caught:
        client.chat.completions.create(**body, extra_body=rest)
    assert caught.value.status_code == status and caught.value.body["type"] == "invalid_request_error"
    too_long = "context is" in said or "characters" in said
    assert (caught.value.code == "context_length_exceeded") == too_long


def test_nulls_are_as_good_as_nothing(client):
    nothing = {"stop": None, "seed": None, "store": None, "tools": None}
    made = client.chat.completions.create(**GREEDY, messages=CHAT, max_tokens=1, extra_body=nothing)
    assert made.usage.completion_tokens == 1


def ask(server, method, path, body=None, **headers):
    """A request as it is; status and body."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("headers", "body", "status", "said"),
    [
        ({"Host": "evil.example"}, "{}", 403, "host 'evil.example'"),
        ({"Origin": "http://evil.example"}, "{}", 403, "pages of 'http://evil.example'"),
        ({"Origin": "null"}, "{}", 403, "pages of 'null'"),
        ({}, '{"model": "ti', 400, "not valid JSON"),
        ({}, b'{"model": "\xff"}', 400, "parsing the body"),
        ({}, "[" * 100_000, 400, ""),
        ({}, "[]", 400, ""),
        (
            {},
            '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
            400,
            "cannot be read",
        ),
        ({}, b" " * (17 << 20), 413, "larger than"),
    ],
)
def test_strangers_and_bodies_that_are_none_are_refused(server, headers, body, status, said):
    path = "/v1/chat/completions"
    found, answer = ask(server, "POST", path, body, Content_Type="application/json", **headers)
    error = json.loads(answer)["error"]
    assert found == status and said in error["message"] and error["type"] == "invalid_request_error"


def test_a_body_without_its_type_is_told_so(server):
    status, answer = ask(server, "POST", "/v1/completions", '{"model": "tiny", "prompt": "owl"}')
    assert status == 400 and "Content-Type: application/json" in json.loads(answer)["error"]["message"]


def test_a_prompt_of_ids_that_the_model_has_not_is_refused(client):
    for token in (264, -1, 10**30):
        with pytest.raises(openai.BadRequestError, match=f"token id {token} of 264"):
            client.completions.create(**GREEDY, prompt=[5, token])


def test_a_body_that_comes_too_slowly_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr("tawny.serving.guard._MOST_SECONDS", 0.1)
    head = "POST /v1/completions HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\n"
    with connected(server, f"{head}Content-Length: 100\r\n\r\n{{") as slow:
        assert b" 408 " in slow.recv(100)


@pytest.mark.parametrize(
    "sent", ["", "GET /health HTTP/1.1\r\nHo", "GET /health HTTP/1.1\r\nHost: HOST\r\n\r\n"]
)
def test_a_connection_that_asks_for_nothing_more_is_closed(server, monkeypatch, sent):
    monkeypatch.setattr("tawny.serving.web._IDLE", 0.2)
    with connected(server, sent) as idle:
        answer = b"".join(iter(partial(idle.recv, 4096), b""))  # until the server closes
    assert (b" 200 " in answer) == ("HOST" in sent)


def test_a_request_that_takes_longer_than_an_idle_connection_may_is_answered(server, monkeypatch):
    monkeypatch.setattr("tawny.serving.web._IDLE", 0.01)
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        made = client.completions.create(**GREEDY, prompt="owl", max_tokens=200)
    assert made.usage.completion_tokens == 200


def test_a_connection_whose_client_reads_nothing_of_the_rest_is_cut():
    done = []
    transport = SimpleNamespace(is_closing=lambda: True, abort=lambda: done.append("cut"))
    loop = SimpleNamespace(call_later=lambda *_: None)
    connection = SimpleNamespace(cycle=None, transport=transport, loop=loop, _seen=None)
    connection._close_if_idle = partial(Connection._close_if_idle, connection)
    connection._close_if_idle()
    assert done == ["cut"]


def test_nobody_listens_to_the_world_without_a_key(model, tokenizer):
    with pytest.raises(UserError, match="--allow-open"):
        tawny.serve(model, tokenizer=tokenizer, host="0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be listened at"):
            tawny.serve("no/such", port=taken.getsockname()[1])


def test_a_full_queue_says_when_to_come_back_and_a_client_that_leaves_is_forgotten(tokenizer):
    log = []
    keys = {"max_sequences": 1, "queue": 0, "api_key": "k", "log": log.append}
    with serving(served_model(), tokenizer, **keys) as (server, client):
        assert ask(server, "GET", "/v1/models")[0] == 401 and ask(server, "GET", "/health")[0] == 200
        long = client.completions.create(**GREEDY, prompt="owl", max_tokens=1000, stream=True)
        next(iter(long))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**GREEDY, prompt="owl")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        long.close()
        wait(lambda: any("left unfinished" in line for line in log))
        wait(lambda: json.loads(ask(server, "GET", "/health")[1])["running"] == 0)
        page = ask(server, "GET", "/metrics", Authorization="Bearer k")[1].decode()
        assert 'tawny_requests_total{finish="cancelled"} 1.0' in page
        assert re.search(r"tawny_generated_tokens_total [1-9]", page)
        assert client.completions.create(**GREEDY, prompt="owl", max_tokens=2).usage.completion_tokens == 2
        long = client.completions.create(**GREEDY, prompt="owl", max_tokens=1000, stream=True)
        next(iter(long))
    assert not any("owl" in line for line in log), "a text came into the log"


def test_a_request_may_not_take_for_ever(model, tokenizer):
    with serving(model, tokenizer, timeout=0.05) as (server, client):
        with pytest.raises(openai.InternalServerError, match="longer than it may") as caught:
            client.completions.create(**GREEDY, prompt="owl", max_tokens=1000)
        assert caught.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="longer than it may"):
            list(client.completions.create(**GREEDY, prompt="owl", max_tokens=1000, stream=True))
        page = ask(server, "GET", "/metrics")[1].decode()
        assert 'tawny_requests_total{finish="timeout"} 2.0' in page and "cancelled" not in page


def test_a_model_without_a_chat_template_continues_texts(model):
    with serving(model, byte_tokenizer(None)) as (_, client):
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny", messages=CHAT)
        assert client.completions.create(**GREEDY, prompt="owl", max_tokens=3).usage.completion_tokens == 3


def test_keys_and_values_of_sliding_windows_are_counted_and_must_fit(tokenizer, monkeypatch):
    window, context, count = 16, 256, 4
    for family, more, windows, wholes in (
        ("mistral", {"sliding_window": window}, 3, 0),
        ("gemma3_text", {"sliding_window": window}, 2, 1),
        ("bamba", BAMBA, 0, 1),
    ):
        model = tiny_model(family, vocab_size=264, max_position_embeddings=1024, **more)
        keys = {"tokenizer": tokenizer, "max_sequences": count, "context": context}
        with tawny.serve(model, **keys) as server:
            said = server.described()[1]
        token = 2 * 2 * 8 * 4  # keys and values, heads, numbers of a head, bytes of a number
        wanted = count * token * (windows * window + wholes * context)
        assert said == f"{count} sequences of {context} tokens, {size(wanted)} for keys and values"
        with monkeypatch.context() as patched:
            patched.setattr("tawny.decoding.sequences.free_memory", lambda free=wanted - 1: free)
            with pytest.raises(UserError, match="keys and values of 4 sequences"), tawny.serve(model, **keys):
                pass


class Said(Silent):
    """Keeps what a person should read."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_the_context_that_is_asked_for_is_kept_or_its_lowering_said(model, tokenizer):
    unbound = tiny_model("bloom", vocab_size=264)  # its configuration states no context
    for served, context, capacity in (
        (unbound, None, 4096),
        (unbound, 5000, 5000),
        (unbound, 64, 64),
        (model, None, 1024),
        (model, 64, 64),
        (model, 5000, 1024),
    ):
        said = Said()
        with serving(served, tokenizer, max_sequences=1, context=context, progress=said) as (server, _):
            assert f"1 sequences of {capacity} tokens" in server.described()[1]
        lowered = [f"a context of {context} tokens is more than the model has; it is {capacity}"]
        assert said.lines == (lowered if context is not None and capacity < context else [])


def test_a_stream_that_runs_when_the_server_ends_is_told_so(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("tawny.serving.web._GRACE", 0)
    with serving(served_model(), tokenizer, max_sequences=1) as (server, _):
        body = {**GREEDY, "prompt": "owl", "max_tokens": 1000, "n": 4}
        streamed = begun(server, body | {"stream": True}).getresponse()
        whole = begun(server, body)
        streamed.readline()
    answer = whole.getresponse()
    assert answer.status == 503 and json.loads(answer.read())["error"]["code"] == "ending"
    *_, error, end = [line for line in streamed.read().decode().splitlines() if line]
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "the server ends"
    assert end == "data: [DONE]" and not caplog.records


def test_a_request_that_is_cut_at_the_end_leaves_no_traceback(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("tawny.serving.web._GRACE", 0)
    monkeypatch.setattr("tawny.serving.web._LAST", 0.01)
    monkeypatch.setattr("tawny.decoding.worker.Worker.end", lambda self: None)
    with serving(served_model(), tokenizer) as (server, _):
        body = {**GREEDY, "prompt": "owl", "max_tokens": 1000, "n": 4, "stream": True}
        streamed = begun(server, body).getresponse()
        streamed.readline()
        monkeypatch.undo()
    streamed.close()
    assert "Cancel 1 running task" in caplog.text and "Traceback" not in caplog.text


def begun(server, body):
    """A request of a text, whose answer is not waited for."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


# --- as programs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    made = tmp_path_factory.mktemp("served") / "owl"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def tawny_process(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tawny", *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, **more
    )


def test_the_program_serves_curl_and_ends_when_it_is_told(folder, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = tawny_process("serve", folder, "--port", port)
    try:
        line = process.stderr.readline()
        assert f"owl at http://127.0.0.1:{port}" in line, line
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=3)
        whole = client.chat.completions.create(model="owl", temperature=0, messages=CHAT, max_tokens=24)
        assert whole.choices[0].message.content == said.text
        if shutil.which("curl"):
            body = json.dumps({"model": "owl", "temperature": 0, "messages": CHAT, "max_tokens": 24})
            command = ["curl", "-s", f"{url}/chat/completions", "-d", body]
            command += ["-H", "Content-Type: application/json"]
            got = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
            assert got["choices"][0]["message"]["content"] == said.text
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0 and time.monotonic() - begin < 10
    finally:
        process.kill()
        process.wait()


def test_a_conversation_in_the_terminal_remembers(folder, model, tokenizer, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nAnd?\n"))
    code, out, err = run("chat", folder, "-t", 0, "-n", 6)
    first = tawny.generate(model, "Hi", tokenizer=tokenizer, max_tokens=6).text
    said = (("user", "Hi"), ("assistant", first), ("user", "And?"))
    history = [{"role": role, "content": text} for role, text in said]
    second = tawny.generate(model, history, tokenizer=tokenizer, max_tokens=6).text
    assert code == 0, err
    assert out.splitlines() == f"{first}\n{second}\n".splitlines()


@pytest.mark.slow
def test_transformers_own_server_opens_packed_folders(folder, tmp_path, tokenizer):
    packed = tmp_path / "packed"
    tawny.pack(folder, packed, values="f32")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parents[2] / "examples" / "transformers_serve.py"
    command = [sys.executable, str(script), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = openai.OpenAI(
            base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=20, timeout=60
        )
        made = client.completions.create(model=str(packed), prompt="owl", max_tokens=5, temperature=0)
        assert made.usage.completion_tokens == 5
    finally:
        process.terminate()
        process.wait(20)
