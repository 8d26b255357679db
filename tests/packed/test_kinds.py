"""One row of the table is a kind: what is registered here goes through every public function, and into the help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tawny
from tawny.errors import UserError
from tawny.kinds import KINDS, Kind, kind_of, scaled_kinds
from tawny.packed.format import pack, unpack
from tawny.packed.linear import PackedLinear
from tests.packed.cases import python, uneven
from tests.packed.test_folder import saved
from tests.packed.test_live import logits
from tests.tiny import tokens

TOY = Kind(
    "toy3",
    "eight in three bytes, for this test",
    3,
    "uint8",
    None,
    0.3,
    grid=tuple(range(-4, 4)),
    groups=(64, 32),
    error=1.1,
)


@pytest.fixture
def toy(monkeypatch) -> str:
    monkeypatch.setitem(KINDS, TOY.name, TOY)
    return TOY.name


@pytest.mark.parametrize("group", [32, 64])
def test_a_registered_kind_is_packed_saved_opened_multiplied_and_unpacked(toy, group, tmp_path):
    dense = saved(tmp_path / "dense", "qwen2")
    report = tawny.pack(dense, tmp_path / "packed", toy, group, head=toy)
    assert report.values == report.head == toy and report.packed
    model = tawny.load(tmp_path / "packed")
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, PackedLinear) and linear.kind == toy and linear.values.dtype is torch.uint8

    unpacked = tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert not unpacked.exact
    again = tawny.load(tmp_path / "again")
    assert torch.equal(linear.dense(), again.model.layers[0].mlp.up_proj.weight)
    ids = tokens(2, 12)
    torch.testing.assert_close(logits(model, ids), logits(again, ids), atol=2e-4, rtol=2e-4)
    live = tawny.pack_model(tawny.load(dense), toy, group, head=toy)
    assert torch.equal(logits(live, ids), logits(model, ids))
    losses = [tawny.evaluate(tmp_path / name, ids).loss for name in ("packed", "again")]
    assert losses[0] == losses[1]
    found, sparse = tawny.inspect(tmp_path / "packed"), tawny.inspect(dense)
    assert found.sparsity >= sparse.sparsity and found.bytes < sparse.bytes


def test_what_recovery_rounds_to_is_what_packing_stores(toy):
    W = uneven((9, 70))
    assert torch.equal(KINDS["int8"].rounded(W), unpack(pack(W, "int8")))
    assert tawny.Recovery.make(values=toy).values == toy


def test_a_registered_kind_is_refused_like_any_other_where_it_does_not_fit(toy):
    with pytest.raises(
        UserError, match="choose one of bf16, f16, f32, int8, int6, int5, int4, int3, int2, toy3"
    ):
        kind_of("toy5")
    with pytest.raises(
        UserError, match="group 64 goes with int8, int6, int5, int4, int3, int2 or toy3 values, not with bf16"
    ):
        kind_of("bf16", 64)
    with pytest.raises(UserError, match="scales of toy3 cover 64, 32 columns"):
        kind_of(toy, 128)


COMMAND_LINE = """
import sys
from tawny.kinds import KINDS, Kind
KINDS["toy3"] = Kind("toy3", "eight in three bytes", 3, "uint8", None, 0.3, grid=tuple(range(-4, 4)), groups=(64,), error=1.1)
from tawny.__main__ import main
main()
"""


def test_the_help_lists_a_registered_kind():
    for verb, expected in {
        "pack": "toy3 (eight in three bytes)",
        "prune": "int2, toy3",
        "recover": "int2, toy3",
    }.items():
        run = python(COMMAND_LINE, verb, "--help")
        assert expected in " ".join(run.stdout.split()), run.stdout + run.stderr


def test_a_plan_of_a_size_counts_a_registered_kind(tmp_path):
    dense = saved(tmp_path / "dense", "qwen2", hidden_size=64)
    run = python(COMMAND_LINE, "plan", "fit", str(dense), "--size", "1GB", "--seqlen", "24", "--json")
    assert "toy3" in [row["kind"] for row in json.loads(run.stdout)["kinds"]], run.stdout + run.stderr


def test_a_kind_with_a_grid_says_what_rounding_to_it_loses():
    scaled = scaled_kinds()
    assert sorted(scaled, key=lambda kind: kind.error) == sorted(scaled, key=lambda kind: -kind.bits)
    with pytest.raises(ValueError, match="its row needs the `error`"):
        replace(KINDS["int4"], error=0.0)


def test_the_page_of_the_format_and_the_table_say_the_same():
    page = (Path(__file__).parents[2] / "docs" / "packed-format.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 5}
    assert list(table) == list(KINDS)
    for kind in KINDS.values():
        groups = (
            ", ".join("row" if size is None else str(size) for size in kind.groups) if kind.scaled else "—"
        )
        kept = ", ".join(kind.exact) or "—"
        assert table[kind.name] == [str(kind.bits), kind.storage, groups, kept]
