from __future__ import annotations

import contextlib
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tawny
from tawny.calibration.mixture import load_texts, parse_texts, texts_identity
from tawny.calibration.windows import (
    Part,
    TokenisedText,
    evaluation_windows,
    held_out_windows,
    interleaved,
    sample_windows,
    shared_out,
    tokenise,
)
from tawny.decoding import author as writing
from tawny.decoding.author import Author
from tawny.errors import RecipeError, TextError
from tawny.model.structure import plain_head
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("wiki", [("wiki", 1.0)]),
        (["wiki=0.4", "code.jsonl=0.4", "self=0.2"], [("wiki", 0.4), ("code.jsonl", 0.4), ("self", 0.2)]),
        (["wiki=0.5", "a.txt", "b=c.txt"], [("wiki", 0.5), ("a.txt", 0.25), ("b=c.txt", 0.25)]),
        (["chat:talks.jsonl", "wiki"], [("chat:talks.jsonl", 0.5), ("wiki", 0.5)]),
        (["a.txt=0.33", "b.txt=0.33", "wiki=0.33"], [("a.txt", 1 / 3), ("b.txt", 1 / 3), ("wiki", 1 / 3)]),
    ],
)
def test_texts_are_named_with_shares_or_share_what_is_left(given, expected):
    made = [(source.spec, pytest.approx(source.share)) for source in parse_texts(given)]
    assert made == expected and sum(source.share for source in parse_texts(given)) == pytest.approx(1)


@pytest.mark.parametrize(
    "given",
    [["wiki=0.4", "a.txt=0.4"], ["wiki=1", "a.txt"], ["wiki=1.5", "a.txt=-0.5"], ["wiki=0", "a=1"], [], [""]],
)
def test_shares_that_do_not_add_up_are_one_line(given, run, tmp_path):
    with pytest.raises(TextError, match=r"add up to|names nothing"):
        parse_texts(given)
    if given and given[0]:
        with pytest.raises(RecipeError, match="add up to"):
            tawny.Recovery.make(text=given)
        texts = [word for one in given for word in ("--calibration", one)]
        code, _, said = run("prune", tmp_path, "-s", 0.5, "--out", tmp_path / "out", *texts)
        assert code == 2 and "add up to" in said and said.count("\n") == 1


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 200), weights=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_what_is_shared_out_adds_up_and_any_stretch_is_mixed_alike(count, weights):
    shares = [weight / sum(weights) for weight in weights]
    counts = shared_out(count, shares)
    assert sum(counts) == count
    assert all(abs(n - count * share) < 1 for n, share in zip(counts, shares, strict=True))
    order = interleaved(counts)
    assert sorted(order) == list(range(count))
    half = [
        sum(sum(counts[:k]) <= i < sum(counts[: k + 1]) for i in order[: count // 2])
        for k in range(len(counts))
    ]
    assert all(abs(n - of / 2) <= 1 for n, of in zip(half, counts, strict=True))


def mixed(tmp_path, **letters):
    """Texts of one letter each, tokenised by letters: a token says which text it is from."""
    for letter, count in letters.items():
        (tmp_path / f"{letter}.txt").write_text(letter * count)
    tokenizer = tiny_tokenizer()
    return tokenizer, [str(tmp_path / f"{letter}.txt") for letter in letters]


def test_windows_come_from_each_text_by_its_share_and_from_one_alone(tmp_path):
    tokenizer, (a, b) = mixed(tmp_path, a=900, b=300)
    text = load_texts([f"{a}=0.75", f"{b}=0.25"])
    tokens = tokenise(text, tokenizer)
    assert [len(part) for part in tokens.parts] == [900, 300]
    own = [int(tokens.ids[part.start]) for part in tokens.parts]
    assert tokens.bos not in own and len(set(own)) == 2
    begun = tokens.bos is not None
    for made, count in (
        (sample_windows(tokens, 8, 20, 0), 8),
        (evaluation_windows(tokens, 20, 8), 8),
        (held_out_windows(tokens, 4, 20, 0, 10, 4), 4),
        (evaluation_windows(tokens, 20), None),
    ):
        firsts = made[:, int(begun)]
        assert bool((made[:, begun:] == firsts[:, None]).all()), (
            "no window reaches from one text into another"
        )
        found = [int((firsts == token).sum()) for token in own]
        assert found[0] == 3 * found[1] and (count is None or sum(found) == count)
    assert torch.equal(sample_windows(tokens, 8, 20, 5), sample_windows(tokens, 8, 20, 5))


def test_a_text_too_short_for_its_share_is_named(tmp_path):
    tokenizer, (a, b) = mixed(tmp_path, a=900, b=30)
    tokens = tokenise(load_texts([f"{a}=0.5", f"{b}=0.5"]), tokenizer)
    with pytest.raises(TextError, match=r"b\.txt' has 30 tokens, but 40 samples of 20 .*a smaller share"):
        sample_windows(tokens, 80, 20, 0)
    with pytest.raises(TextError, match=r"b\.txt' has 30 tokens, but 4 windows of 20"):
        evaluation_windows(tokens, 20, 8)


def test_a_text_that_no_sample_comes_of_is_refused():
    parts = (Part("much", 0, 500, 0.95), Part("little", 500, 1000, 0.05))
    text = TokenisedText(torch.arange(1000), None, "both", parts)
    assert len(sample_windows(text, 20, 8, 0)) == 20
    with pytest.raises(
        TextError, match=r"little gets none of 8 samples by its share of 0\.05: give more samples"
    ):
        sample_windows(text, 8, 8, 0)
    assert len(evaluation_windows(text, 8, 20)) == 20
    with pytest.raises(
        TextError, match=r"little gets none of 8 windows by its share of 0\.05: give a larger"
    ):
        evaluation_windows(text, 8, 8)
    short = TokenisedText(torch.arange(506), None, "both", (parts[0], Part("little", 500, 506, 0.05)))
    with pytest.raises(TextError, match=r"little has 6 tokens, but 1 window of 8 need 8 \(2 short\)"):
        evaluation_windows(short, 8)


def test_a_text_without_a_free_window_leaves_those_of_the_others(tmp_path):
    tokenizer, (a, b) = mixed(tmp_path, a=900, b=30)
    tokens = tokenise(load_texts([f"{a}=0.95", f"{b}=0.05"]), tokenizer)
    windows = held_out_windows(tokens, 20, 20, 0, 19, 8)  # the one sample of b leaves no 19 of its 30 tokens
    assert windows.shape == (8, 19) and windows.dtype == torch.int64


def test_the_hash_of_a_mixture_is_of_its_texts_and_shares(tmp_path):
    _, (a, b) = mixed(tmp_path, a=90, b=30)
    known = {load_texts(given).sha256 for given in ([a], [a, b], [b, a], [f"{a}=0.4", f"{b}=0.6"])}
    assert len(known) == 4
    before = texts_identity([a, b])
    (tmp_path / "b.txt").write_text("bb")
    assert texts_identity([a, b]) != before


# --- chats -----------------------------------------------------------------------------------------------------------


def chatting():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_a_chat_is_rendered_by_the_models_template(tmp_path):
    talks = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        [{"role": "user", "content": "x"}],
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    made = load_texts(f"chat:{path}", tokenizer=chatting())
    assert made.texts[0].text == "<user>hi|<assistant>ho|\n\n<user>x|" and made.name == f"chat:{path}"


@pytest.mark.parametrize("begins", [True, False])
def test_a_chat_loses_its_first_token_only_where_windows_begin_with_it(begins, tmp_path):
    tokenizer = tiny_tokenizer(begins=begins)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    (tmp_path / "talks.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    made = load_texts(f"chat:{tmp_path / 'talks.jsonl'}", tokenizer=tokenizer)
    assert made.texts[0].text == ("" if begins else "<s>") + "<user>hi|"


def test_a_chat_is_the_same_on_every_day_and_in_every_encoding(tmp_path):
    tokenizer = chatting()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%f') %}{% endif %}{{ date_string }}"
        + CHAT
    )
    (tmp_path / "talks.jsonl").write_text('{"messages": [{"role": "user", "content": "\\ud83d"}]}')
    one, two = (load_texts(f"chat:{tmp_path / 'talks.jsonl'}", tokenizer=tokenizer) for _ in range(2))
    assert one.sha256 == two.sha256 and "\ufffd" in one.texts[0].text


@pytest.mark.parametrize(
    ("content", "template", "words"),
    [
        ('{"text": "plain"}', CHAT, "line 1: expected a JSON object with a list under 'messages'"),
        ("", CHAT, "holds no messages"),
        ('{"messages": []}', CHAT, "line 1"),
        ('{"messages": [{"role": "user", "content": "a"}]}', None, "has none: give plain text"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "{{ raise_exception('no') }}",
            "refuses its messages",
        ),
    ],
)
def test_a_bad_chat_is_one_line(tmp_path, content, template, words):
    (tmp_path / "talks.jsonl").write_text(content)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TextError, match=words) as caught:
        load_texts(f"chat:{tmp_path / 'talks.jsonl'}", tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


# --- what the model writes -------------------------------------------------------------------------------------------


def author(model, tokenizer, **more):
    return Author(lambda: model, tokenizer, None, 1000, 0, **more)


@pytest.fixture
def short(monkeypatch, tmp_path):
    monkeypatch.setattr(writing, "LENGTH", 24)
    monkeypatch.setattr(writing, "SHORTEST", 24)
    monkeypatch.setenv("TAWNY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_model_writes_seeded_text_without_repeated_passages(family, short):
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    one, again = (author(model, tokenizer).write(100) for _ in range(2))
    other = Author(lambda: model, tokenizer, None, 1000, 1).write(100)
    assert one.text == again.text != other.text and one.documents == 5 and one.written["seed"] == 0
    starts = torch.ones(3, 1, dtype=torch.int64)
    torch.manual_seed(0)
    for row in writing._sampled(model, starts, 90, tawny.progress.silent).tolist():
        passages = [tuple(row[i : i + writing.PASSAGE]) for i in range(len(row) - writing.PASSAGE + 1)]
        assert len(row) == 90 and len(passages) == len(set(passages))


def test_the_head_takes_the_last_states_of_several_prompts_as_one_matrix():
    model, seen = tiny_model("llama"), []
    head = model.get_output_embeddings()
    for within in (contextlib.nullcontext(), plain_head(model)):
        with within:
            looking = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
            model(tokens(3, 7), logits_to_keep=1)
            looking.remove()
    assert seen == [False, True] and not head._forward_pre_hooks
    prompts = torch.full((3, 5), 4)
    looking = head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    writing._sampled(model, prompts, 4, tawny.progress.silent)
    looking.remove()
    assert len(seen) == 6 and all(seen[1:]) and not head._forward_pre_hooks


@pytest.mark.parametrize("padding", [0, 2])
def test_a_single_token_attends_by_plain_products_as_by_torchs_own(monkeypatch, padding):
    ids = tokens(3, 7)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0

    @torch.no_grad()
    def logits(dtype=torch.float32):
        model = tiny_model("llama").to(dtype)
        seen = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        return model(ids[:, -1:], attention_mask=mask, past_key_values=seen).logits.float()

    queries, usual = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *a, **keys: queries.append(a[1].shape[2]) or usual(*a, **keys)
    )
    whole, half = logits(), logits(torch.bfloat16)
    assert set(queries) == {1, 6}
    queries.clear()
    with writing._heads_grouped():
        torch.testing.assert_close(logits(), whole, rtol=1e-3, atol=1e-4)
        assert (logits(torch.bfloat16) - whole).norm() < 1.5 * (half - whole).norm()
    assert set(queries) == {6}
    logits()
    assert set(queries) == {1, 6}


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
def test_masks_of_all_heads_and_of_each_are_heeded_by_name(heads, masked):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    states = normal(3, 4, 1, 8), normal(3, 2, 5, 8), normal(3, 2, 5, 6)
    mask = {None: None, torch.bool: normal(3, heads, 1, 5) < 1, torch.float32: normal(3, heads, 1, 5)}[masked]

    def attended():
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, attention_mask=mask, scaling=0.3)[0]

    expected = attended()
    with writing._heads_grouped():
        torch.testing.assert_close(attended(), expected)


def test_words_are_drawn_by_their_probability():
    scores = torch.tensor([1.0, -torch.inf, 3.0, 0.0, 2.0])
    torch.manual_seed(0)
    drawn_RV = writing._drawn(scores.repeat(20_000, 1))
    assert set(drawn_RV.unique().tolist()) == {0.0, -torch.inf} and bool(((drawn_RV == 0).sum(1) == 1).all())
    shares = (drawn_RV == 0).float().mean(0)
    assert shares[1] == 0 and torch.allclose(shares, scores.softmax(-1), atol=0.01)


def test_a_loop_is_left_and_the_first_tokens_are_hot(short):
    """A model that always continues 2, 3, 4, 2, 3, 4 …; 2 is its end token, which ends nothing."""
    model, seen = tiny_model("llama"), []
    forward = model.forward

    def looping(input_ids, **keys):
        made = forward(input_ids=input_ids, **keys)
        scores = torch.zeros_like(made.logits)
        scores.scatter_(2, (2 + (input_ids - 1) % 3)[..., None], 30.0)
        made.logits = scores
        return made

    model.forward = looping
    drawn = writing._drawn

    def watched(scores_RV):
        seen.append(float(scores_RV.max()))
        return drawn(scores_RV)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing, "_drawn", watched)
        written = writing._sampled(model, torch.full((1, 1), 4), 20, tawny.progress.silent)[0].tolist()
    passages = [tuple(written[i : i + writing.PASSAGE]) for i in range(20 - writing.PASSAGE + 1)]
    assert len(passages) == len(set(passages))
    assert written[:5] == [2, 3, 4, 2, 3]
    assert (seen[0], seen[2], seen[4]) == pytest.approx((20.0, 24.0, 30.0))


def test_what_was_written_is_kept_for_a_model_and_its_settings(short):
    model, tokenizer, opened = tiny_model("llama"), tiny_tokenizer(), []

    def opening():
        opened.append(1)
        return model

    def written(identity="a", seed=0):
        return Author(opening, tokenizer, lambda: identity, 1000, seed).write(40)

    assert written().sha256 == written().sha256 and len(opened) == 1
    written(seed=1), written("b")
    assert len(opened) == 3


def test_batches_that_were_written_are_kept_over_a_stop_and_the_model_is_let_go(short, monkeypatch, tmp_path):
    sampled, made = writing._sampled, []

    def stopping(*some):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return sampled(*some)

    def write(identity):
        return Author(lambda: tiny_model("llama"), tiny_tokenizer(), lambda: identity, 1000, 0).write(400)

    monkeypatch.setattr(writing, "TEXTS", 4)
    whole = write("one")  # five batches of four texts
    monkeypatch.setattr(writing, "_sampled", stopping)
    with pytest.raises(KeyboardInterrupt):
        write("two")
    monkeypatch.setattr(writing, "_sampled", lambda *some: made.append(1) or sampled(*some))
    assert write("two").sha256 == whole.sha256 and len(made) == 5
    assert sorted(path.suffix for path in (tmp_path / "cache" / "texts").iterdir()) == [".jsonl", ".jsonl"]

    opened = []

    def opening():
        model = tiny_model("llama")
        model.again = [model]  # as the hooks of a stack do
        opened.append(weakref.ref(model))
        return model

    Author(opening, tiny_tokenizer(), lambda: "three", 1000, 0).write(40)
    assert opened[0]() is None


def test_a_template_that_trims_questions_still_begins_texts(short):
    tokenizer = chatting()
    plain = author(tiny_model("llama"), tokenizer)._starts()
    tokenizer.chat_template = CHAT.replace("m['content']", "m['content'] | trim")
    assert author(tiny_model("llama"), tokenizer)._starts() == plain and len(plain) == 2


def test_bad_authors_are_one_line(short):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(RecipeError, match=r"takes 1 kB and the memory is 10 B: give another text"):
        author(model, tokenizer, memory=10).write(40)
    with pytest.raises(TextError, match="none is at hand"):
        load_texts("self")
    forward = model.forward

    def ending(**keys):
        made = forward(**keys)
        made.logits[..., 2] = 1e4
        return made

    model.forward = ending
    with pytest.raises(TextError, match="nothing but its end token"):
        author(model, tokenizer).write(40)
    with pytest.raises(TextError, match="has neither"):
        author(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)).write(40)


# --- through the front door ------------------------------------------------------------------------------------------


def test_every_verb_reads_mixtures_and_what_the_model_writes(run, short, tmp_path):
    _, (a, b) = mixed(tmp_path, a=3000, b=3000)
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    tiny_model("llama").save_pretrained(dense)
    chatting().save_pretrained(dense)
    given = ["--calibration", f"{a}=0.5", "--calibration", f"{b}=0.25", "--calibration", "self=0.25"]
    sizes = ["-s", 0.5, "-m", "wanda", "-a", "uniform", "--samples", 8, "--seqlen", 16]
    code, out, err = run("plan", "prune", dense, *sizes, *given, "--json")
    assert code == 0 and "writes its text first" in out, err
    code, out, err = run("plan", "prune", dense, *sizes, *given, "--memory", "1kB")
    assert code == 2 and "is written by the whole model" in err
    code, out, err = run("prune", dense, "--out", pruned, *sizes, *given, "--json")
    assert code == 0, err
    text = json.loads((pruned / "run.json").read_text())["text"]
    assert [one["share"] for one in text["sources"]] == [0.5, 0.25, 0.25]
    assert [one["name"] for one in text["sources"]] == [a, b, "self"] and text["sources"][2]["written"][
        "seed"
    ] == 0
    for page in ("README.md", "report.html"):
        told = (pruned / page).read_text()
        assert all(one["sha256"] in told for one in (text, *text["sources"]))
    little = ["--calibration", f"{a}=0.8", "--calibration", "self=0.2", "--samples", 4]  # 0.8 of a sample
    code, out, err = run("prune", dense, "--out", tmp_path / "little", *sizes[:-4], *little, "--seqlen", 16)
    assert code == 0, err
    mixture = ["--text", f"{a}=0.5", "--text", "self"]
    few = ["--seqlen", 16, "--windows", 4]
    code, out, err = run("eval", pruned, *mixture, *few, "--against", dense, "--json")
    assert code == 0 and json.loads(out)["windows"] == 4, err
    code, out, err = run("eval", pruned, *mixture, *few)
    assert code == 2 and "none is at hand" in err
    few = ["--seqlen", 16, "--tokens", 512, "--device", "cpu"]
    code, out, err = run(
        "recover", pruned, "--teacher", dense, "--out", tmp_path / "out", *mixture, *few, "--json"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "recover.json").read_text())
    assert [one["name"] for one in record["text"]["sources"]] == [a, "self"] and record["steps"] == 32
    assert record["text"]["sources"][1]["written"]["seed"] == 3 << 30  # not what calibration has read
