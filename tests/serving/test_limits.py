"""What one request may cost the others before it is refused."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from tawny.serving import running as running_module
from tawny.serving.answers import Service
from tawny.serving.grammar import Grammars
from tawny.serving.protocol import ChatRequest, CompletionRequest, Refused
from tests.serving.test_server import CHAT, TOOL, ask, wait
from tests.serving.tiny import TEMPLATE, byte_tokenizer, connected, serving


@pytest.fixture(scope="module")
def service(model, tokenizer):
    return Service(model, tokenizer, "tiny", capacity=1024, most=7)


def chat(messages=CHAT, **more):
    return ChatRequest.model_validate({"model": "tiny", "messages": messages} | more)


def complete(**fields):
    return CompletionRequest.model_validate({"model": "tiny"} | fields)


CALL = {"function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [1] * 3000}, "3000 messages and calls are too many; expected at most 2048"),
        ({"messages": [1] * 2000}, "valid dictionary"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 1500}] * 2}, "3002 messages and calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [1] * 2000}]}, "valid dictionary"),
        ({"tools": [TOOL] * 129}, "at most 128"),
        ({"tools": [1] * 100_000}, "valid dictionary"),
        ({"stop": [1] * 100_000}, "valid string"),
        ({"stop": "x" * 257}, "256 characters"),
        ({"logit_bias": {str(token): 1 for token in range(3000)}}, "3000 biases"),
        ({str(number): 1 for number in range(3000)}, "3002 fields"),
    ],
)
def test_a_long_list_is_not_read_to_its_end(fields, said):
    with pytest.raises(ValidationError, match=said) as caught:
        chat(**fields)
    assert caught.value.error_count() == 1


def test_too_many_prompts_are_not_read():
    with pytest.raises(ValidationError, match="at most 2048"):
        complete(prompt=["a"] * 3000)


@pytest.fixture
def counted(monkeypatch):
    """How often samplers and grammars are made, which is what costs memory and time."""
    made = {"sampler": 0, "grammar": 0}

    def counting(owner, name, key):
        plain = getattr(owner, name)

        def call(*arguments):
            made[key] += 1
            return plain(*arguments)

        monkeypatch.setattr(owner, name, call)

    counting(Service, "_sampler", "sampler")
    counting(Grammars, "form", "grammar")
    return made


def test_every_setting_arrives(service, monkeypatch):
    given = []
    monkeypatch.setattr("tawny.serving.answers.Sampler", lambda *some, **named: given.append((some, named)))
    named = {
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    }
    asked = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["x"], "max_tokens": 3} | named
    asked["logit_bias"] = {"5": 2.0}
    made = [service.complete(complete(prompt="owl", **asked))[0], service.chat(chat(**asked))[0]]
    assert [(request.stops, request.most) for (request,) in made] == [(("x",), 3)] * 2
    assert len(given) == 2
    for some, more in given:
        assert some == (0.5, 0.9, 7) and more["logit_bias"] == {5: 2.0} and more.items() >= named.items()


JSON = {"type": "json_object"}


def test_too_many_texts_are_refused_before_anything_is_made_for_them(service, counted):
    for asked, count in (
        (chat(n=8), 8),
        (chat(n=128, response_format=JSON), 128),
        (chat(n=8, tools=[TOOL]), 8),
    ):
        with pytest.raises(Refused, match=f"{count} texts in one request are more than the 7"):
            service.chat(asked)
    with pytest.raises(Refused, match="256000 texts in one request are more than the 7"):
        service.complete(complete(prompt=["a"] * 2000, n=128))
    assert counted == {"sampler": 0, "grammar": 0}


def test_a_prompt_that_does_not_fit_is_refused_before_samplers_are_made(service, counted):
    with pytest.raises(Refused, match="tokens and the context is 1024"):
        service.chat(chat([{"role": "user", "content": "x" * 2000}], n=7))
    for prompt in ("x" * 2000, [5] * 2000):
        with pytest.raises(Refused, match="the prompt has 2000 tokens and the context is 1024"):
            service.complete(complete(prompt=prompt, n=7))
    assert counted["sampler"] == 0


def test_a_grammar_is_read_once_for_all_choices(service, counted):
    for more in ({"response_format": JSON}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "required"}):
        counted["grammar"] = 0
        requests, _ = service.chat(chat(n=7, **more))
        constraints = [request.choose.constraint for request in requests]
        assert counted["grammar"] == 1 and len(set(map(id, constraints))) == 7


def test_choices_keep_to_the_form_apart(client):
    made = client.chat.completions.create(
        model="tiny", messages=CHAT, seed=3, n=5, max_tokens=300, tools=[TOOL], tool_choice="required",
        parallel_tool_calls=False,
    )  # fmt: skip
    for choice in made.choices:
        assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] in ("Oslo", "Rome")


LONG = "x " * 50_000


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [TOOL | {"function": {"name": "f", "description": LONG}}]},
        {"tools": [TOOL | {"function": {"name": "f", "parameters": {"type": "object", "title": LONG}}}]},
        {"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": json.dumps(LONG)}}]}]},
        {"messages": [{"role": "user", "content": "x" * 10}] * 2000},
    ],
)  # fmt: skip
def test_whatever_the_template_writes_counts_before_it_does(service, asked):
    with pytest.raises(Refused, match=r"characters, far more than the context"):
        service.chat(chat(**asked))


def test_what_the_template_makes_of_a_tool_counts_before_it_is_tokenised(model):
    tokenizer = byte_tokenizer(TEMPLATE.replace("tool | tojson", "tool | tojson(indent=4)"))
    deep = [0] * 200
    for _ in range(100):
        deep = [deep]
    function = {"name": "f", "parameters": {"type": "object", "examples": deep}}
    service = Service(model, tokenizer, "tiny", capacity=1024, most=7)
    with pytest.raises(Refused, match=r"the chat template makes \d+ characters of them, and \d+ fit"):
        service.chat(chat(tools=[TOOL | {"function": function}]))


def test_a_token_is_read_once(service, monkeypatch):
    monkeypatch.setattr(service, "_shown", {})
    first = service.word(5), service.bytes_of(5)
    monkeypatch.setattr("tawny.serving.answers.decode", None)
    assert (service.word(5), service.bytes_of(5)) == first


def test_whoever_waits_to_be_prepared_takes_a_place_and_whoever_has_gone_is_not_prepared(
    model, tokenizer, monkeypatch
):
    plain, begun, go, prepared = Service.complete, threading.Event(), threading.Event(), []

    def slow(self, asked):
        prepared.append(asked.prompt)
        begun.set()
        assert go.wait(60)
        return plain(self, asked)

    monkeypatch.setattr(Service, "complete", slow)
    log, path = [], "/v1/completions"
    keys = {"max_sequences": 2, "queue": 1, "log": log.append}
    with serving(model, tokenizer, **keys) as (server, _), ThreadPoolExecutor(2) as pool:

        def complete(prompt):
            body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 1})
            return ask(server, "POST", path, body, Content_Type="application/json")

        first = pool.submit(complete, "first")
        assert begun.wait(60)
        body = json.dumps({"model": "tiny", "prompt": "gone"})
        head = f"POST {path} HTTP/1.1\r\nHost: HOST\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        second = pool.submit(complete, "second")
        with connected(server, head + body):
            wait(lambda: json.loads(ask(server, "GET", "/health")[1])["waiting"] == 3)
            status, told = complete("third")
            assert status == 429 and b"1 requests wait and 1 may" in told
        go.set()
        assert first.result(60)[0] == second.result(60)[0] == 200
        wait(lambda: any(" 499 " in line for line in log))
        assert _cancelled(server) == 1
        with connected(server, head + body[:9]):
            pass  # and goes in the middle of its body
        wait(lambda: _cancelled(server) == 2)
    assert prepared == [["first"], ["second"]]


def _cancelled(server):
    return float(
        re.search(r'requests_total{finish="cancelled"} (\S+)', ask(server, "GET", "/metrics")[1].decode())[1]
    )


def test_a_client_that_reads_nothing_does_not_outlast_the_time_it_has():
    async def run():
        ended = []

        async def chunks():
            yield b"a chunk"

        async def stuck(message):
            await asyncio.Event().wait()

        async def receive():
            await asyncio.Event().wait()

        deadline = asyncio.get_running_loop().time() - running_module._LAST_WORDS
        running = SimpleNamespace(deadline=deadline, late=lambda: ended.append("late"))
        stream = running_module.Streamed(running, None, lambda: ended.append("done"))
        stream.body_iterator = chunks()
        await asyncio.wait_for(stream({"type": "http"}, receive, stuck), 20)
        return ended

    assert asyncio.run(run()) == ["late", "done"]


def test_tools_that_are_not_shown_do_not_count(service):
    service.chat(chat(tools=[TOOL | {"function": {"name": "f", "description": LONG}}], tool_choice="none"))


def test_a_schema_that_takes_long_to_read_is_refused(service):
    schema = {"enum": [str(number) for number in range(100_000)]}
    form = {"type": "json_schema", "json_schema": {"name": "owl", "schema": schema}}
    with pytest.raises(Refused, match=r"'response_format' has .* characters; expected at most 262144"):
        service.chat(chat(response_format=form))


def test_half_a_character_in_a_schema_is_refused(server):
    schema = {"enum": ["\ud800"]}
    for more in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "owl", "schema": schema}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
    ):
        body = json.dumps({"model": "tiny", "messages": CHAT} | more)
        status, answer = ask(server, "POST", "/v1/chat/completions", body, Content_Type="application/json")
        assert status == 400, answer


@pytest.mark.parametrize("deep", [200, 900, 5000])
def test_a_deep_schema_is_answered_or_refused(server, deep):
    schema = '{"properties":{"a":' * deep + "{}" + "}}" * deep
    head = '{"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}], '
    for body in (
        head + '"response_format": {"type": "json_schema", "json_schema": {"name": "owl", "schema": ' + schema + "}}}",
        head + '"tools": [{"type": "function", "function": {"name": "f", "parameters": ' + schema + "}}]}",
    ):  # fmt: skip
        status, answer = ask(server, "POST", "/v1/chat/completions", body, Content_Type="application/json")
        assert status in (200, 400), answer
