"""Who may ask, and what the log shows of those who may not."""

from __future__ import annotations

import http.client
import json

import pytest

import tawny
from tawny.errors import RecipeError, short
from tawny.serving.guard import Guard
from tests.serving.test_server import ask, wait


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("key", ["", " ", "\n"])
def test_a_blank_key_is_no_key(model, tokenizer, host, key):
    with pytest.raises(RecipeError, match="api_key is blank"):
        tawny.serve(model, tokenizer=tokenizer, host=host, api_key=key)


def test_a_key_may_end_its_line_and_have_any_letters(model, tokenizer):
    with tawny.serve(model, tokenizer=tokenizer, name="tiny", api_key="schlüssel\n") as running:
        for given in ("schlüssel".encode().decode("latin-1"), "schlüssel"):  # as curl and as browsers send it
            assert ask(running, "GET", "/v1/models", Authorization=f"Bearer {given}")[0] == 200
        assert ask(running, "GET", "/v1/models", Authorization="Bearer schlussel")[0] == 401


@pytest.fixture(scope="module", params=["127.0.0.1", "0.0.0.0"])
def locked(request, model, tokenizer):
    """A server with a key; the tests reach both at this machine's own address."""
    with tawny.serve(model, tokenizer=tokenizer, name="tiny", host=request.param, api_key="k") as running:
        running.address = running.address.replace("0.0.0.0", "127.0.0.1")
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "llm.example.com"},
        {"Host": "llm.example.com", "Origin": "https://llm.example.com"},
        {"Host": "127.0.0.1", "Origin": "https://llm.example.com"},
        {"Host": "host.docker.internal:8000"},
    ],
)
def test_whoever_knows_the_key_may_come_by_any_name(locked, headers):
    for path in ("/", "/health"):
        assert ask(locked, "GET", path, **headers)[0] == 200
    for path in ("/v1/models", "/metrics"):
        assert ask(locked, "GET", path, **headers, Authorization="Bearer k")[0] == 200
        for more in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer K"}):
            assert ask(locked, "GET", path, **headers, **more)[0] == 401


def test_pages_of_other_sites_may_ask_with_the_key_and_only_with_it(locked, server):
    page = {"Origin": "https://chat.example.com"}
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-own"}
    answers = [
        headers_of(locked, "OPTIONS", "/v1/chat/completions", page | wish),
        headers_of(locked, "GET", "/v1/models", page | {"Authorization": "Bearer k"}),
        headers_of(locked, "GET", "/v1/models", page),
        headers_of(server, "OPTIONS", "/v1/chat/completions", page | wish),
    ]
    assert [status for status, _ in answers] == [200, 200, 401, 403]
    assert [told.get("access-control-allow-origin") for _, told in answers] == ["*", "*", "*", None]
    assert answers[0][1]["access-control-allow-headers"] == "authorization,x-own"


def headers_of(server, method, path, headers):
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


def test_a_stranger_cannot_write_to_the_operators_terminal(server, log):
    path = "/%1b]0;owned%07%1b[2J%c2%9b%e2%80%ae"
    assert ask(server, "GET", path)[0] == 404
    wait(lambda: any("owned" in line for line in log))
    (line,) = [line for line in log if "owned" in line]
    assert line.isprintable() and r"/\x1b]0;owned\x07\x1b[2J\x9b\u202e 404" in line
    status, answer = ask(server, "GET", "/", Host="\x9b31m.example")
    assert status == 403 and r"'\x9b31m.example'" in json.loads(answer)["error"]["message"]


def test_capitals_in_the_address_are_those_of_a_browser():
    mine = Guard(None, host="Localhost", key=None, log=print)
    named = Guard(None, host="MyBox.lan", key=None, log=print)
    assert mine.local and not named.local
    assert named._refusal({"headers": [(b"host", b"mybox.lan:8000")], "path": "/health"}) is None


def test_an_origin_that_is_none_is_refused(server):
    status, answer = ask(server, "GET", "/v1/models", Origin="http://[x")
    assert status == 403 and "may not ask" in json.loads(answer)["error"]["message"]


def test_what_is_short_is_printable():
    assert short("a \x1b[31m\n b\u202e") == r"a \x1b[31m b\u202e"
    assert short("Eule 🦉 é") == "Eule 🦉 é"
    assert len(short("\x1b" * 100)) == 60
