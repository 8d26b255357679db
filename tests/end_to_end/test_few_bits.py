"""Values of few bits: solved on the grid, packed as they were solved, opened, shared by an allocator."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

import tawny
from tawny.choosing.level import UNMEASURED, Level
from tawny.choosing.packed_size import PackedSize
from tawny.packed.folder import PackedFolder
from tawny.progress import Silent, silent
from tawny.pruning.prepare import prepare
from tawny.recipe.schema import Recipe
from tests.tiny import tiny_model, tokens


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def blocks_of(folder):
    return {name: entry for name, entry in PackedFolder(folder).linears.items() if ".layers." in name}


@pytest.mark.parametrize(
    ("kind", "group", "sparsity", "solver"),
    [
        *itertools.product(["int4"], [32], [0.0, 0.5], ["alps", "sparsegpt", "wanda", "magnitude"]),
        ("int8", None, 0.0, "wanda"),
        ("int8", None, 0.5, "sparsegpt"),
        ("int8", 64, 0.0, "alps"),
        ("int8", 64, 0.5, "sparsegpt"),
    ],
)
def test_what_is_solved_on_a_grid_is_packed_without_a_change(dense, tmp_path, kind, group, sparsity, solver):
    values = {"kind": kind, "group_size": group, "head": "int8"}
    keys = {"allocator": "atp", "calibration": tokens(8, 16)}  # no linear keeps so much that it needs no mask
    record = tawny.prune(dense, tmp_path / "pruned", sparsity=sparsity, solver=solver, values=values, **keys)
    assert record.sparsity == pytest.approx(sparsity, abs=0.01) and set(record.values.values()) == {kind}
    report = tawny.pack(tmp_path / "pruned", tmp_path / "packed")
    assert (report.values, report.group, report.head) == (kind, group, "int8")
    entries = blocks_of(tmp_path / "packed")
    assert {entry.values for entry in entries.values()} == {kind}
    # Weights as lopsided as a random tiny model's have so many zeros in some linears that a mask takes less.
    whole = sum(entry.whole for entry in entries.values())
    assert whole == 0 if sparsity else whole > len(entries) / 2
    pruned, packed = tawny.load(tmp_path / "pruned"), tawny.load(tmp_path / "packed")
    for name in entries:
        dense_OI = packed.get_submodule(name).dense(torch.bfloat16)
        assert torch.equal(dense_OI, pruned.get_submodule(name).weight)


@pytest.mark.parametrize("solver", ["alps", "sparsegpt", "magnitude"])
def test_a_weight_that_dwarfs_others_keeps_long_scales_and_the_planned_bytes(dense, tmp_path, solver):
    model, name = tawny.load(dense), "model.layers.0.mlp.down_proj"
    model.get_submodule(name).weight.data[1, 3] = 300.0
    model.save_pretrained(tmp_path / "lopsided")
    keys = {"sparsity": 0.0, "solver": solver, "values": {"kind": "int4", "head": "int8"}}
    tawny.prune(tmp_path / "lopsided", tmp_path / "pruned", calibration=tokens(8, 16), **keys)
    tawny.pack(tmp_path / "pruned", tmp_path / "packed")
    long = {key for key, entry in blocks_of(tmp_path / "packed").items() if not entry.short}
    assert long == {name}
    pruned, packed = tawny.load(tmp_path / "pruned"), tawny.load(tmp_path / "packed")
    for key in blocks_of(tmp_path / "packed"):
        assert torch.equal(packed.get_submodule(key).dense(torch.bfloat16), pruned.get_submodule(key).weight)
    job = prepare(Recipe.from_mapping(keys), tmp_path / "lopsided", silent, "cpu")
    sizes, info = PackedSize(job), next(x for x in job.linears if x.name == name)
    folder = PackedFolder(tmp_path / "packed")
    taken = sum(folder.tensors[f"{name}.{key}"].bytes for key in folder.linears[name].wanted())
    spans = -(-info.shape[1] // 64) * 2  # of 32 columns
    level = Level(0.0, "int4")
    far = sizes.linear(info, level, measures=replace(UNMEASURED, far=True))
    assert far - sizes.linear(info, level) < info.shape[0] * spans
    assert far > taken


def test_the_command_line_packs_what_it_solved(run, dense, tmp_path):
    words = ("-m", "magnitude", "-a", "uniform", "--values", "int3", "--head", "int8")
    code, out, err = run("prune", dense, "--out", tmp_path / "packed", *words, "--json")
    assert code == 0 and "only rounded" not in err and not (tmp_path / "packed.partial").exists()
    assert json.loads(out)["packed"]["values"] == "int3"
    code, _, err = run("pack", dense, "--out", tmp_path / "rounded", "--values", "int3")
    assert code == 0 and "linears were only rounded" in err
    code, _, err = run(
        "prune", dense, "--out", tmp_path / "x", "-s", "0.5", "-m", "magnitude", "--head", "int8"
    )
    assert code == 2 and "give --pack or --values" in err


def test_an_allocator_shares_bits_and_the_mean_is_kept(products, dense, tmp_path):
    values = {"mean": 4.5, "of": ["int3", "int4", "int8"]}
    keys = {"allocator": "owl", "solver": "sparsegpt", "values": values}
    record = tawny.prune(dense, tmp_path / "pruned", calibration=tokens(8, 16), **keys)
    sizes = {x.name: x.shape[0] * x.shape[1] for x in record.linears}
    spent = sum(int(kind[3:]) * sizes[name] for name, kind in record.values.items())
    assert 4.5 * sum(sizes.values()) - 4 * max(sizes.values()) < spent <= 4.5 * sum(sizes.values())
    tawny.pack(tmp_path / "pruned", tmp_path / "packed")
    assert {name: entry.values for name, entry in blocks_of(tmp_path / "packed").items()} == record.values
    lines = []
    told = Silent()
    told.say = lines.append
    trained = tmp_path / "trained"
    keys = {"tokens": 16 * 4 * 3, "lr": 1e-2, "eval_every": 2, "progress": told}
    tawny.recover(tmp_path / "packed", dense, trained, text=tokens(24, 16), **keys)
    assert {name: entry.values for name, entry in blocks_of(trained).items()} == record.values
    assert any("training through the grids of int3, int4, int8" in line for line in lines)
    assert not any("only rounded" in line for line in lines)
    before, after = (next((tmp_path / name).glob("*.safetensors")) for name in ("packed", "trained"))
    assert before.read_bytes() != after.read_bytes()
