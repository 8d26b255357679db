from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.packed.folder import PackedFolder
from tests.packed.test_folder import bytes_of, saved
from tests.packed.test_live import logits
from tests.tiny import tokens

PRUNE = ("-s", 0.7, "-a", "uniform", "-m", "magnitude")


def interrupt(monkeypatch):
    """Ctrl-C, as soon as packing begins."""
    monkeypatch.setattr(
        "tawny.pruning.packing.pack", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt())
    )


def lines(folder):
    card = (folder / "README.md").read_text().splitlines()
    return [line for line in card if not line.startswith(("- date", "- time"))]


@pytest.fixture
def dense(tmp_path) -> Path:
    return saved(tmp_path / "dense", dtype=torch.bfloat16)


def test_pack_and_unpack_say_what_they_did_and_undo_each_other(run, dense, tmp_path):
    packed, again = tmp_path / "packed", tmp_path / "again"
    code, out, err = run("pack", dense, "--out", packed, "--values", "int8", "--head", "int8")
    assert code == 0 and "bits each" in out and "head int8" in out and "packing: 3 blocks" in err
    code, out, _ = run("pack", dense, "--out", packed, "--overwrite", "--json")
    report = json.loads(out)
    assert code == 0 and report["values"] == "bf16" and report["packed"] == 21 and report["ratio"] < 1
    code, out, _ = run("unpack", packed, "--out", again)
    assert code == 0 and "bit for bit" in out
    assert bytes_of(again) == bytes_of(dense)
    code, out, _ = run("unpack", packed, "--out", again, "--overwrite", "--json")
    assert code == 0 and json.loads(out)["exact"] is True
    code, _, err = run("pack", packed, "--out", again, "--overwrite")
    assert code == 2 and "packed already" in err
    code, _, err = run("pack", dense, "--out", packed, "--values", "int7")
    assert code == 2 and "'int8'" in err
    code, out, _ = run("pack", dense, "--out", packed, "--overwrite", "--head", "BF16", "--json")
    assert code == 0 and json.loads(out)["head"] == "bf16"
    code, _, err = run("pack", dense, "--out", packed, "--overwrite", "--head", "BFloat16")
    assert code == 2 and "did you mean 'bf16'?" in err


def test_an_embedding_gets_a_kind_of_its_own_unless_it_is_the_head(run, dense, tmp_path):
    ends = ("--head", "int8", "--embedding", "int4")
    code, out, _ = run("pack", dense, "--out", tmp_path / "packed", *ends)
    assert code == 0 and "head int8, embedding int4" in out
    folder = PackedFolder(tmp_path / "packed")
    kinds = {name: entry.values for name, entry in folder.linears.items() if "layers" not in name}
    assert kinds == {"lm_head": "int8", "model.embed_tokens.table": "int4"}
    live = tawny.pack_model(tawny.load(dense), head="int8", embedding="int4")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(tawny.load(tmp_path / "packed")(ids).logits, live(ids).logits)
    code, out, _ = run("pack", dense, "--out", tmp_path / "rows", "--embedding", "int4", "--json")
    assert code == 0 and json.loads(out)["embedding"] == "int4"
    rows = PackedFolder(tmp_path / "rows").linears
    assert "lm_head" not in rows and rows["model.embed_tokens.table"].values == "int4"
    tied = saved(tmp_path / "tied", dtype=torch.bfloat16, tie_word_embeddings=True)
    code, _, err = run("pack", tied, "--out", tmp_path / "no", *ends)
    assert code == 2 and "are one matrix" in err and not (tmp_path / "no").exists()
    words = ("prune", tied, "--out", tmp_path / "no", *PRUNE, "--pack", "int8", *ends)
    code, _, err = run(*words)
    assert code == 2 and "are one matrix" in err
    assert not list(tmp_path.glob("no*"))  # refused before the work
    code, _, err = run("prune", dense, "--out", tmp_path / "no", *PRUNE, "--embedding", "int4")
    assert code == 2 and "embedding=int4 is of a packed folder" in err


def test_prune_with_pack_writes_one_packed_folder_with_its_record(run, dense, tmp_path):
    packed = tmp_path / "packed"
    code, out, err = run("prune", dense, "--out", packed, *PRUNE, "--pack", "bf16")
    assert code == 0 and "tawny unpack" in err and "% of the dense" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]
    record = json.loads((packed / "run.json").read_text())
    assert record["packed"]["values"] == "bf16" and record["out"] == str(packed)
    assert set(record["files"]) == {path.name for path in packed.glob("*.safetensors")}
    assert "Packed by Tawny" in (packed / "README.md").read_text()

    code, out, _ = run("inspect", packed, "--json")
    assert code == 0 and json.loads(out)["sparsity"] == pytest.approx(0.7, abs=1e-3)

    assert run("unpack", packed, "--out", tmp_path / "again")[0] == 0
    tawny.prune(dense, tmp_path / "plain", sparsity=0.7, allocator="uniform", solver="magnitude")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "plain")
    assert lines(tmp_path / "again") == lines(tmp_path / "plain")
    unpacked = json.loads((tmp_path / "again" / "run.json").read_text())
    plain = json.loads((tmp_path / "plain" / "run.json").read_text())
    assert unpacked["packed"] == {}
    assert unpacked["files"] == plain["files"] and unpacked["bytes"] == plain["bytes"]
    model = AutoModelForCausalLM.from_pretrained(packed)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(model, tokens(1, 8)), logits(twin, tokens(1, 8)), atol=0.1, rtol=0.1)


def test_prune_with_pack_refuses_before_work_and_never_hides_a_half(run, dense, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    packed.mkdir()
    code, _, err = run("prune", dense, "--out", packed, *PRUNE, "--pack", "bf16")
    assert code == 2 and "exists" in err
    packed.rmdir()
    code, _, err = run("prune", dense, "--out", packed, *PRUNE, "--pack", "int7")
    assert code == 2 and "int8" in err and not (tmp_path / "packed.partial").exists()

    interrupt(monkeypatch)
    code, _, _ = run("prune", dense, "--out", packed, *PRUNE, "--pack", "bf16")
    assert code == 1 and (tmp_path / "packed.partial" / "steps" / "dense").exists() and not packed.exists()


def test_prune_with_pack_never_replaces_its_source_and_refuses_what_packing_would(
    run, dense, tmp_path, monkeypatch
):
    monkeypatch.setattr("tawny.pruning.packing.prune", lambda *_, **__: pytest.fail("pruned for nothing"))
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    words = (*PRUNE, "--pack", "bf16", "--overwrite")
    code, _, err = run("prune", dense, "--out", dense, *words)
    assert code == 2 and "is the model itself; a source is never overwritten" in err
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run("prune", dense, "--out", tmp_path, *words)
    assert code == 2 and "holds the model" in err
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
    (notes := tmp_path / "notes").mkdir()
    (notes / "todo.txt").write_text("mine")
    code, _, err = run("prune", dense, "--out", notes, *words)
    assert code == 2 and "is not a checkpoint folder" in err
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "journal.json").write_text("{}")
    code, _, err = run("prune", dense, "--out", tmp_path / "run", *words[:-1])
    assert code == 2 and "is damaged" in err and (tmp_path / "run.partial").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    code, _, err = run("prune", dense, "--out", tmp_path / "link", *words)
    assert code == 2 and "is a link to nothing" in err
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "dense",
        "link",
        "notes",
        "run.partial",
    }


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_run_stopped_while_packing_is_continued_by_the_same_command(
    run, dense, tmp_path, monkeypatch, overwrite
):
    words = ("prune", dense, "--out", tmp_path / "packed", *PRUNE, "--pack", "bf16", *overwrite)
    with monkeypatch.context() as stopped:
        interrupt(stopped)
        assert run(*words)[0] == 1
    code, _, err = run(*words[: -1 - len(overwrite)], "int8")
    assert code == 2 and 'values was "bf16", now "int8"' in err
    monkeypatch.setattr("tawny.pruning.packing.prune", lambda *_, **__: pytest.fail("pruned again"))
    code, _, err = run(*words)
    assert code == 0 and [path.name for path in tmp_path.iterdir() if path.name != "dense"] == ["packed"], err
    assert json.loads((tmp_path / "packed" / "run.json").read_text())["out"] == str(tmp_path / "packed")
