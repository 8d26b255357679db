"""The format of a call is learnt from templates of several manners, and found again in what a model writes."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.serving.grammar import Grammars
from tawny.serving.protocol import Function, Refused
from tawny.serving.tools import Beginning, CallFormat, ParsedCall, Watched
from tests.serving.tiny import TEMPLATE, byte_tokenizer

HEAD = (
    "{%- if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{%- for m in messages %}<|{{ m.role }}|>"
)
TAIL = "<|end|>{%- endfor %}{%- if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "marks around each": TEMPLATE,
    "JSON alone": HEAD
    + "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    + '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{{ "; " if not loop.last }}'
    + "{% endfor %}{% else %}{{ m.content }}{% endif %}"
    + TAIL,
    "a list behind a special token, with ids": HEAD
    + "{% if m.tool_calls %}<|tool|>[{% for c in m.tool_calls %}"
    + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    + '{{ ", " if not loop.last }}{% endfor %}]{% else %}{{ m.content }}{% endif %}'
    + TAIL,
}
FUNCTIONS = [
    Function(
        name="look",
        parameters={"type": "object", "properties": {"at": {"enum": ["owl"]}}, "required": ["at"]},
    ),
    Function(name="wait"),
]


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request):
    return byte_tokenizer(TEMPLATES[request.param])


def rendered(tokenizer, *calls):
    """The assistant's turn of a conversation with these calls, as the template writes it."""
    said = [
        {"id": "abcdefg12", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls
    ]
    whole = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": said}]
    text = tokenizer.apply_chat_template(whole, tools=[{"a": 1}], tokenize=False)
    return text.rpartition("<|assistant|>")[2].removesuffix("<|end|>")


def test_calls_are_found_in_what_the_template_writes(tokenizer):
    learnt = CallFormat.learn(tokenizer, {tokenizer.eos_token_id})
    one, other = ("look", {"at": "owl"}), ("wait", {})
    for calls in ([one], [one, other], [other, one, other]):
        text = rendered(tokenizer, *calls)
        found = learnt.parse(text)
        assert found == ("", [ParsedCall(name, json.dumps(arguments)) for name, arguments in calls]), text
    assert learnt.parse("I see an owl.") == ("I see an owl.", [])
    cut = rendered(tokenizer, one)[:-12].partition('"owl')[0]
    assert learnt.parse(cut) == (cut, [])


def test_arguments_are_handed_out_as_the_model_wrote_them():
    tokenizer = byte_tokenizer()
    learnt = CallFormat.learn(tokenizer, {tokenizer.eos_token_id})
    for arguments in ('{"a": 1e400}', r'{"a": "\ud83d"}', '{ "a":1.50,\n"a": "é" }'):
        text = f'<call>\n{{"name": "f", "arguments": {arguments}}}\n</call>'
        assert learnt.parse(text) == ("", [ParsedCall("f", arguments)])
    for arguments in ('{"a": NaN}', '{"a": -Infinity}', '{"a":' + "[" * 100_000):
        text = f'<call>\n{{"name": "f", "arguments": {arguments}}}\n</call>'
        assert learnt.parse(text) == (text, [])


def test_a_copy_is_a_text_of_its_own(tokenizer):
    learnt = CallFormat.learn(tokenizer, {tokenizer.eos_token_id})
    grammars = Grammars(tokenizer, 264, {tokenizer.eos_token_id})
    inside = learnt.grammar(FUNCTIONS, grammars, tokenizer, several=False)
    first = Watched(learnt.begin, grammars.form(inside, "tools"), tokenizer)
    other = first.copy()
    for token in tokenizer(learnt.begin, add_special_tokens=False)["input_ids"]:
        first.take(token)
    assert int(first.allowed().sum()) == 2 and other.allowed().all()
    for token in tokenizer(learnt.begin + "l", add_special_tokens=False)["input_ids"]:
        other.take(token)
    assert int(first.allowed().sum()) == 2 and int(other.allowed().sum()) == 1


def test_the_grammar_allows_what_the_template_writes_and_nothing_else(tokenizer):
    learnt = CallFormat.learn(tokenizer, {tokenizer.eos_token_id})
    grammars = Grammars(tokenizer, 264, {tokenizer.eos_token_id})
    inside = learnt.grammar(FUNCTIONS, grammars, tokenizer, several=True)
    whole = learnt.whole_grammar(inside, grammars, tokenizer)

    def allows(text):
        form = grammars.form(whole, "tools")
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not form.allowed()[token]:
                return False
            form.take(token)
        return bool(form.allowed()[tokenizer.eos_token_id])

    assert allows(rendered(tokenizer, ("look", {"at": "owl"})).strip())
    assert allows(rendered(tokenizer, ("look", {"at": "owl"}), ("wait", {})).strip())
    assert not allows(rendered(tokenizer, ("look", {"at": "cat"})).strip())
    assert not allows(rendered(tokenizer, ("fly", {})).strip())
    assert not allows("I see an owl.")


def test_a_text_is_free_until_it_begins_a_call(tokenizer):
    learnt = CallFormat.learn(tokenizer, {tokenizer.eos_token_id})
    grammars = Grammars(tokenizer, 264, {tokenizer.eos_token_id})
    inside = learnt.grammar(FUNCTIONS, grammars, tokenizer, several=False)
    watched = Watched(learnt.begin, grammars.form(inside, "tools"), tokenizer)
    for token in tokenizer("I see: " + learnt.begin, add_special_tokens=False)["input_ids"]:
        assert watched.allowed().all() and not watched.over
        watched.take(token)
    may = [tokenizer.decode([token]) for token in torch.nonzero(watched.allowed()).flatten().tolist()]
    assert sorted(may) == ["l", "w"]  # look, wait


def test_a_template_may_take_one_call_at_once():
    one = '{% if m.tool_calls | length > 1 %}{{ raise_exception("one call at once!") }}{% endif %}'
    tokenizer = byte_tokenizer(TEMPLATES["JSON alone"].replace("{% for c in", one + "{% for c in"))
    learnt = CallFormat.learn(tokenizer, {tokenizer.eos_token_id})
    text = rendered(tokenizer, ("look", {"at": "owl"}))
    assert learnt.between is None and learnt.parse(text + "; " + text)[1] == learnt.parse(text)[1]
    assert learnt.parse(text) == ("", [ParsedCall("look", '{"at": "owl"}')])
    grammars = Grammars(tokenizer, 264, {tokenizer.eos_token_id})
    assert "call)*" not in learnt.grammar(FUNCTIONS, grammars, tokenizer, several=True)


@settings(max_examples=200, deadline=None)
@given(
    begin=st.sampled_from(['<call>\n{"name": "', "a a b", '{"id": "tawnyid00", "name": "', "[TOOL] ["]),
    before=st.text("<cal>a b\n{[", max_size=12),
    behind=st.text("xyz", max_size=3),
    spaces=st.sampled_from(["", " ", "\n\n"]),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_a_beginning_is_found_wherever_pieces_end(begin, before, behind, spaces, cuts):
    written = re.sub(r"\s+", spaces, begin).replace("tawnyid00", "abc")
    text, found = before + written + behind, Beginning(begin)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    given = "".join(found.add(text[a:b]) for a, b in pairwise(ends))
    whole = Beginning(begin)
    assert whole.add(text) == given and whole.behind == found.behind is not None
    assert text.startswith(given) and text.endswith(found.behind)
    plain = Beginning(begin + " and so on" * 500)
    assert plain.add("owl ") + plain.add("and ") == "owl and " and plain.behind is None


def test_a_call_is_watched_whatever_spaces_the_model_writes(tokenizer):
    learnt = CallFormat.learn(tokenizer, {tokenizer.eos_token_id})
    grammars = Grammars(tokenizer, 264, {tokenizer.eos_token_id})
    inside = learnt.grammar(FUNCTIONS, grammars, tokenizer, several=False)
    watched = Watched(learnt.begin, grammars.form(inside, "tools"), tokenizer)
    written = re.sub(r"\s+", "", learnt.begin)
    assert written != learnt.begin
    for token in tokenizer("I see: " + written, add_special_tokens=False)["input_ids"]:
        watched.take(token)
    assert int(watched.allowed().sum()) == 2  # look, wait


def test_templates_that_cannot_call_are_refused():
    plain = HEAD.replace("{{ tools | tojson }}", "") + "{{ m.content }}" + TAIL
    shows = HEAD + "{{ m.content }}" + TAIL
    for template, said in ((plain, "shows it no tools"), (shows, "not supported")):
        with pytest.raises(Refused, match=said):
            CallFormat.learn(byte_tokenizer(template), {256})
