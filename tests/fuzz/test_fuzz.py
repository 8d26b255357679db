"""Whatever happens to a file, Tawny gives the same result or says in one line what is wrong.

`make fuzz N=…` runs the same with any number of mutations; `TAWNY_FUZZ_SEED` says where the seeds begin.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader

import tawny
from tawny.allocation import File, LinearInfo, Profile
from tawny.errors import TawnyError
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.packed import folder as packed_folder
from tawny.recipe.files import dump_recipe, load_recipe
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_safetensors
from tests.model.test_source import write as write_gguf
from tests.tiny import tiny_model, tokens

FIRST = int(os.environ.get("TAWNY_FUZZ_SEED", "0"))
IDS = tokens(1, 6)


def judged(run: Callable[[], str | None]) -> str | None:
    """What is wrong with how a run ended, or None."""
    try:
        return run()
    except TawnyError as error:
        return f"several lines: {error}" if "\n" in str(error) else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def check_all(usual: int, one: Callable[[Random], str | None], *found_before: int) -> None:
    count = int(os.environ.get("TAWNY_FUZZ") or usual)
    seeds = (*range(FIRST, FIRST + count), *found_before)
    found = {seed: wrong for seed in seeds if (wrong := judged(lambda seed=seed: one(Random(seed))))}
    assert not found, "\n".join(f"seed {seed}: {wrong}" for seed, wrong in found.items())


def damaged(
    folder: Path, copy: Path, name: str, mutate: Callable[[bytes, Random], bytes], rng: Random
) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in folder.iterdir():
        data = path.read_bytes()
        (copy / path.name).write_bytes(mutate(data, rng) if path.name == name else data)
    return copy


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("fuzz")
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        for linear in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj):
            linear.weight[linear.weight.abs() < 0.2] = 0
    model.save_pretrained(base / "dense")
    tawny.pack(base / "dense", base / "packed", "bf16")
    tawny.pack(base / "dense", base / "packed8", "int8", head="int8")
    tawny.pack(base / "dense", base / "packed4", "int4", 32, head="int6")  # with masks and whole
    return {path.name: path for path in base.iterdir()}


@pytest.mark.parametrize("kind,usual", [("packed", 60), ("packed8", 25), ("packed4", 25)])
def test_a_damaged_packed_folder(kind, usual, folders, tmp_path, caplog):
    folder = folders[kind]
    expected = logits(tawny.load(folder))
    shard = next(folder.glob("packed-*")).name
    kinds = [("config.json", mutate_json)] * 3 + [(INDEX, mutate_json), (shard, mutate_safetensors)]

    def one(rng: Random) -> str | None:
        name, mutate = rng.choice(kinds)
        copy = damaged(folder, tmp_path / "copy", name, mutate, rng)
        caplog.clear()
        if rng.random() < 0.2:  # the other way in
            tawny.inspect(copy)
        found = logits(tawny.load(copy))
        warned = any(record.name == "tawny.packed.folder" for record in caplog.records)
        packed_folder._say_changed.cache_clear()  # it says so once for each folder, and all have one name here
        return None if warned or torch.equal(found, expected) else "other numbers, and no warning"

    with caplog.at_level(logging.WARNING, "tawny.packed.folder"):
        check_all(usual, one)


def test_a_damaged_dense_folder(folders, tmp_path):
    """Nothing keeps hashes of it, so that only what fails is judged."""
    kinds = [("config.json", mutate_json)] * 2 + [("model.safetensors", mutate_safetensors)]

    def one(rng: Random) -> None:
        copy = damaged(folders["dense"], tmp_path / "copy", *rng.choice(kinds), rng)
        rng.choice([tawny.load, tawny.inspect, lambda source: tawny.evaluate(source, IDS)])(copy)

    check_all(60, one)


RECIPE = """
sparsity: 0.6
allocator: {name: owl, lambda: 0.1, M: 5}
solver: {name: sparsegpt, damp: 0.01}
pattern: "2:4"
calibration: {text: wiki, samples: 8, seqlen: 128}
include: ["*.mlp.*"]
seed: 3
"""


def test_a_damaged_recipe(tmp_path):
    def one(rng: Random) -> str | None:
        path = tmp_path / "recipe.yaml"
        text = RECIPE.replace('pattern: "2:4"', "pattern: unstructured") if rng.random() < 0.7 else RECIPE
        as_json = json.dumps(yaml.safe_load(text))
        damage = (
            mutate_bytes(text.encode(), rng) if rng.random() < 0.5 else mutate_json(as_json.encode(), rng)
        )
        path.write_bytes(damage)
        recipe = load_recipe(path)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        return None if load_recipe(path) == recipe else "it is another recipe once it was written"

    check_all(150, one)


NAMES = [f"model.layers.{block}.{part}" for block in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")]
PROFILE = Profile(tuple(LinearInfo(name, (8, 8), i // 2) for i, name in enumerate(NAMES)))
TABLE = dict(zip(NAMES, (0.25, 0.75, 0.5, 0.5, 0.75, 0.25), strict=True))
ALLOCATIONS = {
    "a.yaml": "\n".join(['"*": 0.5', *(f"{name}: {value}" for name, value in TABLE.items())]),
    "a.json": json.dumps({"sparsity": 0.5, "allocation": TABLE}),
    "a.txt": "\n".join(f"{name}: {level}" for name, level in zip(NAMES, (-1, 1, 0, 0, 2, -2), strict=True)),
}


def test_a_damaged_allocation(tmp_path):
    def one(rng: Random) -> str | None:
        name, text = rng.choice(list(ALLOCATIONS.items()))
        mutate = mutate_json if name == "a.json" and rng.random() < 0.7 else mutate_bytes
        (tmp_path / name).write_bytes(mutate(text.encode(), rng))
        found = File(path=str(tmp_path / name)).allocate(PROFILE, 0.5)
        if list(found) != NAMES or not all(0 <= value <= 1 for value in found.values()):
            return f"no allocation: {found}"
        return None if abs(sum(found.values()) / len(found) - 0.5) <= 1e-3 else f"another mean: {found}"

    check_all(150, one)


def test_a_damaged_gguf_header(tmp_path, monkeypatch):
    monkeypatch.setenv("TAWNY_CACHE", str(tmp_path / "cache"))
    whole = write_gguf(tmp_path / "whole.gguf")
    data, end = whole.read_bytes(), GGUFReader(str(whole)).data_offset

    def one(rng: Random) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(mutate_bytes(data, rng, rng.choice([64, 700, end])))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        logits(tawny.load(path))

    # Three that once leaked: two sizes that no memory holds, and an alignment of 0.
    check_all(25, one, 1075, 1099, 1584)
