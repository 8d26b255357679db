"""`tawny.fit` through the front door."""

from __future__ import annotations

import json

import pytest
import torch

import tawny
from tawny.errors import Interrupted, RecipeError, TextError, UserError
from tawny.kinds import KINDS
from tawny.packed.folder import INDEX, PackedFolder
from tawny.patterns import removed_count
from tawny.progress import silent
from tawny.pruning.prepare import prepare
from tawny.recipe.merge import resolve_recipe
from tawny.searching import fit as module
from tawny.searching import fit_finalists
from tawny.searching.fit_bytes import PackedSize
from tests.tiny import tiny_model, tokens

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
TOKENS = tokens(40, 24)
KEYS = {"solver": "sparsegpt", "calibration": TOKENS, "fit.windows": 2, "fit.deciding": 6}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dense"
    tiny_model("qwen2", dtype=torch.bfloat16, **SHAPE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(dense):
    return tawny.fit(dense, dense.parent / "fitted", bits=9, **KEYS)


def weights(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_the_model_fits_and_is_the_nearest_of_the_finalists(dense, fitted):
    folder = dense.parent / "fitted"
    rows = {row["name"]: row for row in fitted.finalists}
    assert fitted.bytes <= fitted.budget and sum(row["uniform"] for row in rows.values()) == 1
    for row in rows.values():
        assert 0.95 * row["planned"] <= row["bytes"] <= row["planned"]
    taken = (
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) + (folder / INDEX).stat().st_size
    )
    assert taken == fitted.bytes == rows[fitted.winner]["bytes"]
    assert rows[fitted.winner]["kl"] == min(row["kl"] for row in rows.values())
    found = tawny.agreement(folder, dense, TOKENS[-6:])
    assert found.kl == rows[fitted.winner]["kl"]
    kinds = {entry.name: entry.values for entry in PackedFolder(folder).linears.values()}
    assert {name: level["kind"] for name, level in fitted.linears.items()}.items() <= kinds.items()


def test_the_record_tells_of_the_fit_and_its_recipe_makes_the_model_again(dense, fitted, tmp_path):
    folder = dense.parent / "fitted"
    assert not (dense.parent / "fitted.partial").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["fit"]["says"] == fitted.says and run["out"] == str(folder)
    assert "Chosen for its size" in (folder / "README.md").read_text()
    assert "chosen for its size" in (folder / "report.html").read_text()
    assert {"fit.png", "fit.svg", "fit.json"} <= {path.name for path in folder.iterdir()}
    recipe = tawny.load_recipe(folder / "recipe.yaml")
    tawny.prune(dense, tmp_path / "again", recipe=recipe, calibration=TOKENS[:-8])
    tawny.pack(tmp_path / "again", tmp_path / "packed")
    assert weights(tmp_path / "packed") == weights(folder)


def test_a_fit_that_was_stopped_goes_on_and_gives_the_same(dense, fitted, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    for home, place in ((module, "react_head"), (fit_finalists, "pack")):
        with monkeypatch.context() as patched:
            patched.setattr(home, place, stop)
            with pytest.raises(Interrupted, match="kept"):
                tawny.fit(dense, tmp_path / "fitted", bits=9, **KEYS)
        assert not (tmp_path / "fitted").exists()
    monkeypatch.setattr(module, "measure", stop)  # what was measured is not measured again
    again = tawny.fit(dense, tmp_path / "fitted", bits=9, **KEYS)
    assert again.finalists == fitted.finalists and again.resumed == 2
    assert weights(tmp_path / "fitted") == weights(dense.parent / "fitted")


def test_another_size_takes_what_was_measured(dense, fitted, tmp_path, monkeypatch):
    small = tawny.fit(dense, tmp_path / "small", bits=8.5, **KEYS)
    with monkeypatch.context() as patched:
        patched.setattr(module, "measure", None)  # would be called
        again = tawny.fit(dense, tmp_path / "again", bits=8.5, measured=dense.parent / "fitted", **KEYS)
        assert again.finalists == small.finalists
        assert weights(tmp_path / "again") == weights(tmp_path / "small")
    for words, keys in {"differs in recipe": {"seed": 1}, "no folder that": {"measured": tmp_path}}.items():
        with pytest.raises(RecipeError, match=words):
            tawny.fit(
                dense, tmp_path / "no", bits=8.5, **{"measured": dense.parent / "fitted", **KEYS, **keys}
            )


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_bytes_are_known_before_packing(family, tmp_path):
    model = tiny_model(family, dtype=torch.bfloat16, **SHAPE)
    model.get_output_embeddings().weight.data[:4] = 0  # zeros that nobody removed
    model.save_pretrained(tmp_path / "dense")
    for number, (kind, group, sparsity, head) in enumerate(
        [("int8", None, 0.0, "int8"), ("int4", 32, 0.0, None), ("int3", None, 0.5, "int4")]
    ):
        recipe = resolve_recipe(
            {"allocator": "uniform", "solver": "magnitude", "sparsity": sparsity},
            values={"kind": kind, "group_size": group, "head": head},
        )
        job = prepare(recipe, tmp_path / "dense", silent, "cpu")
        sizes = PackedSize(job)
        planned = sizes.rest + sizes.of_head(head)
        planned += sum(sizes.linear(x, sparsity, kind, group) for x in job.linears)
        tawny.prune(tmp_path / "dense", tmp_path / f"{number}.dense", recipe=recipe)
        made = tawny.pack(tmp_path / f"{number}.dense", tmp_path / str(number))
        assert 0.9 * planned <= made.file_bytes <= planned
        tensors = sum(x.bytes for x in made.linears)
        kept = [x.numel - removed_count(x.numel, sparsity) for x in job.linears]
        assert tensors > sum(kept) * KINDS[kind].bits / 8


def test_what_cannot_be_is_said_before_the_work(dense, tmp_path, run):
    out = tmp_path / "out"
    refused = {
        "either size": {},
        r"cannot be made as small as 10 kB: .* give --size \d+ \(or --bits [0-9.]+\), or more": {
            "size": "10kB"
        },
        "bits 40.0 is not possible": {"bits": 40.0},
        "is not a size": {"size": "much"},
        "leave sparsity out": {"bits": 4, "sparsity": 0.5},
        "leave include out": {"bits": 4, "include": "*.q_proj"},
        "choose alps or sparsegpt": {"bits": 4, "solver": "wanda"},
        "fit.window is not a known fit key": {"bits": 4, "fit.window": 2},
        "give at least 4 samples": {"bits": 9, "calibration": TOKENS[:3]},
    }
    for words, changes in refused.items():
        with pytest.raises((RecipeError, TextError), match=words):
            tawny.fit(dense, out, **{**KEYS, **changes})
    with pytest.raises(UserError, match="save the live model"):
        tawny.fit(tiny_model("llama"), out, bits=4)
    code, _, err = run("fit", dense, "--size", "1GB", "--bits", "4", "--out", out, "--calibration", "wiki")
    assert code == 2 and "either size" in err and not out.exists()
