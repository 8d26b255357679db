from __future__ import annotations

import pytest

import tawny
from tawny.decoding import conversation
from tawny.decoding.conversation import Conversation
from tawny.decoding.sequences import Sequences
from tawny.errors import TextError
from tests.serving.tiny import byte_tokenizer, served_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    served_model().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def said(talk, text):
    return "".join(talk.say(text))


def test_answers_are_those_of_generate_and_what_was_said_is_not_read_again(folder, monkeypatch):
    begin, begun = Sequences.begin, []

    def beginning(self, ids):
        one = begin(self, ids)
        begun.append((one.cached, len(ids)))
        return one

    monkeypatch.setattr(Sequences, "begin", beginning)
    talk = Conversation(folder, temperature=0, max_tokens=6, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for text in ("An owl", "Another"):
        messages.append({"role": "user", "content": text})
        answer = said(talk, text)
        assert answer == tawny.generate(folder, messages, max_tokens=6).text
        messages.append({"role": "assistant", "content": answer})
    (_, first), (cached, _) = begun
    assert cached >= first
    assert talk.scheduler.sequences.together  # one call a token, as `tawny generate` has


def test_what_the_model_is_told_first_must_be_text():
    with pytest.raises(TextError, match=r"not valid UTF-8 \(at character 1\)"):
        Conversation("no/such", system="\udcff")


@pytest.mark.parametrize("context", [48, None])
def test_the_oldest_question_is_forgotten_where_the_context_is_full(context, folder, monkeypatch):
    if context is None:
        monkeypatch.setattr(conversation, "_CONTEXT", 48)
    talk = Conversation(folder, temperature=0, max_tokens=3, context=context)
    for text in ("x" * 20, "y" * 20, "z" * 20):
        said(talk, text)
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["z" * 20]
    with pytest.raises(TextError, match="the context is 48"):
        said(talk, "w" * 60)
    assert talk.messages[0]["content"] == "z" * 20  # forgetting it would not have helped
    said(talk, "v")  # goes on


def test_the_oldest_question_is_forgotten_where_an_answer_would_have_no_room(folder, monkeypatch):
    monkeypatch.setattr(conversation, "_CONTEXT", 48)
    talk = Conversation(folder, temperature=0, max_tokens=12)
    talk.messages = [{"role": "user", "content": "x" * 10}, {"role": "assistant", "content": "y" * 10}]
    said(talk, "z" * 10)  # 37 tokens with the history
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["z" * 10]
    assert talk.finish == "length"
    said(talk, "w" * 40)  # fits alone, but leaves less room
    assert talk.finish == "context"
