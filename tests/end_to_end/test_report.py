from __future__ import annotations

import json

import pytest

from tests.tiny import tiny_model
from tests.tokenizer import tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    words = "The owl is a bird of the night, and it hears what it cannot see. " * 4
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} {words}" for i in range(6)))
    return tmp_path


def prune(run, folder, *more):
    """Prune, measure and report; returns what was said, on both streams."""
    text = folder / "text.txt"
    where = (folder / "dense", "--out", folder / "out", "--calibration", text, "--eval", text)
    code, shown, err = run("prune", *where, "-s", "0.5", "--samples", "2", "--seqlen", "32", *more)
    assert not code, err
    return shown, err


@pytest.mark.parametrize("packed", [False, True])
def test_a_prune_that_measures_ends_with_a_report_of_both_models(folder, packed, run):
    out = folder / "out"
    shown, err = prune(run, folder, "--json", *(["--pack", "bf16"] if packed else []))
    record = json.loads(shown)
    assert str(out / "report.html") in err
    assert len(record["generated"]) == 3 and record["generated"][0]["prompt"].startswith("0 The owl")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What they write" in page and record["files"]
    assert all(file["sha256"] in page for file in record["files"].values())
    assert ("import tawny" in page) == packed
    assert "| perplexity |" in (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "run.json").read_text())["generated"] == record["generated"]


@pytest.mark.parametrize("compat", [None, "official"])
def test_what_is_measured_begins_with_bos_whatever_the_samples_do_and_says_so(folder, compat, run):
    tiny_tokenizer(begins=True).save_pretrained(folder / "dense")
    out = folder / "out"
    shown, _ = prune(run, folder, *(["-o", "compat=official"] if compat else []))
    record = json.loads((out / "run.json").read_text())
    assert record["text"]["bos"] is (compat is None)
    assert all(record["evaluation"][name]["bos"] for name in ("dense", "pruned"))
    assert "windows of 32 tokens, each begun with BOS" in " ".join(shown.split())
    said = 2 if compat is None else 1  # of the samples, and of the windows
    for name in ("README.md", "report.html"):
        assert (out / name).read_text(encoding="utf-8").count("each begun with BOS") == said
