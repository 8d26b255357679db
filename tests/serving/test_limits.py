"""What one request may cost the others before it is refused."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from tawny.serving.answers import Service
from tawny.serving.grammar import Grammars
from tawny.serving.protocol import ChatRequest, CompletionRequest, Refused
from tests.serving.test_server import CHAT, TOOL, ask


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
