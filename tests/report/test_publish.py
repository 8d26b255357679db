"""Card and report made anew: a recovered model stays recovered when it is packed and unpacked."""

from __future__ import annotations

import json
import shutil

import pytest

import tawny
from tawny.progress import Silent
from tawny.report.publish import refresh
from tests.recovery.models import recover_pair, save_pair
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovered")
    recover_pair(save_pair(folder), folder / "out", tokens=24 * 4 * 4)
    return folder / "out"


def check(folder):
    card = (folder / "README.md").read_text()
    assert card.count("## Recovered") == 1 and "Held-out perplexity" in card
    assert "Embeddings, head, norms and biases are" not in card
    assert "How it came back" in (folder / "report.html").read_text()


def test_a_recovered_model_is_still_one_when_it_is_packed_and_unpacked(run, recovered, tmp_path):
    code, _, err = run("pack", recovered, "--out", tmp_path / "packed")
    assert code == 0, err
    check(tmp_path / "packed")
    assert "Packed by Tawny" in (tmp_path / "packed" / "README.md").read_text()
    code, _, err = run("unpack", tmp_path / "packed", "--out", tmp_path / "again")
    assert code == 0, err
    check(tmp_path / "again")


def test_without_recover_json_the_record_tells_of_the_recovery(recovered, tmp_path):
    shutil.copytree(recovered, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "recover.json").read_text())
    (tmp_path / "out" / "recover.json").unlink()
    path = tmp_path / "out" / "run.json"
    keys = ("settings", "text", "tokens", "start", "best")
    made = {**json.loads(path.read_text()), "recovery": {key: told[key] for key in keys}}
    path.write_text(json.dumps(made))
    refresh(tmp_path / "out")
    assert "## Recovered" in (tmp_path / "out" / "README.md").read_text()
    assert "Trained after pruning on" in (tmp_path / "out" / "report.html").read_text()


def test_a_recovered_model_that_is_pruned_again_is_not_recovered(recovered, tmp_path):
    out = tmp_path / "out"
    tawny.prune(recovered, out, sparsity=0.7, allocator="uniform", solver="magnitude")
    shutil.copyfile(recovered / "recover.json", out / "recover.json")
    refresh(out)
    assert "## Recovered" not in (out / "README.md").read_text()
    assert "How it came back" not in (out / "report.html").read_text()


def test_the_run_json_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "done"}')
    refresh(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("makes", "fails", "left"),
    [("model_card", "README.md", "report.html"), ("write_report", "report.html", "README.md")],
)
def test_what_cannot_be_told_of_a_run_does_not_fail_it(tmp_path, monkeypatch, makes, fails, left):
    said = []

    class Hears(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    def broken(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(f"tawny.pruning.writing.{makes}", broken)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    tawny.prune(
        tmp_path / "dense", out, sparsity=0.5, allocator="uniform", solver="magnitude", progress=Hears()
    )
    assert f"{fails} could not be made: RuntimeError: no ink" in said
    assert (out / "model.safetensors").is_file() and (out / left).is_file()
