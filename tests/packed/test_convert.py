from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.errors import CheckpointError, NumericalError, UserError
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.packed.folder import PackedCheckpoint
from tawny.packed.linear import PackedLinear
from tawny.packed.writer import PackedWriter
from tawny.progress import Silent
from tests.packed.test_folder import bytes_of, saved
from tests.packed.test_live import greedy, logits, pruned
from tests.reference import packed_folder
from tests.tiny import FAMILIES, tiny_model, tokens

KINDS = [("bf16", None, None), ("f32", None, None), ("int8", None, "int8"), ("int8", 128, None)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_loading_and_unpacking_give_back_every_bit(family, tied, tmp_path):
    dense = saved(tmp_path / "dense", family, tie_word_embeddings=tied)
    report = tawny.pack(dense, tmp_path / "packed", "f32", head="f32")
    assert report.packed and report.to_dict()["bytes"] < report.source_bytes

    model = tawny.load(tmp_path / "packed")
    twin = AutoModelForCausalLM.from_pretrained(dense).eval()
    ids = tokens(2, 24)
    assert torch.equal(logits(tawny.load(dense), ids), logits(twin, ids))
    torch.testing.assert_close(logits(model, ids), logits(twin, ids), atol=2e-4, rtol=2e-4)
    packed_live = [
        m for m in tawny.pack_model(twin, "f32", head="f32").modules() if isinstance(m, PackedLinear)
    ]
    packed_read = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed_live) == len(packed_read) > 0
    for live, read in zip(packed_live, packed_read, strict=True):
        assert torch.equal(live.values, read.values) and torch.equal(live.masks, read.masks)

    unpacked = tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert unpacked.exact and unpacked.bytes == report.source_bytes
    assert bytes_of(tmp_path / "again") == bytes_of(dense)
    before = json.loads((dense / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == before


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "mixtral"])
@pytest.mark.parametrize("values,group,head", KINDS)
def test_a_folder_computes_what_the_live_model_packed_alike_computes(family, values, group, head, tmp_path):
    dense = saved(tmp_path / "dense", family, torch.bfloat16)
    tawny.pack(dense, tmp_path / "packed", values, group, head)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    live = tawny.pack_model(AutoModelForCausalLM.from_pretrained(dense).eval(), values, group, head)
    ids = tokens(1, 12)
    assert torch.equal(logits(model, ids), logits(live, ids))
    assert torch.equal(greedy(model, ids, 4), greedy(live, ids, 4))
    assert set(model.state_dict()) == set(live.state_dict())


def test_the_bytes_are_those_the_format_promises(tmp_path):
    model_path = saved(
        tmp_path / "dense",
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        sparsity=0.7,
    )
    report = tawny.pack(model_path, tmp_path / "packed", "bf16")
    numel = sum(form.shape[0] * form.shape[1] for form in report.linears)
    survivors = sum((1 - form.sparsity) * form.shape[0] * form.shape[1] for form in report.linears)
    assert sum(form.bytes for form in report.linears) == pytest.approx(2 * survivors + numel / 8, rel=0.02)
    whole = tawny.pack(model_path, tmp_path / "int8", "int8", head="int8")
    head = next(form for form in whole.linears if form.name == "lm_head")
    rows, columns = head.shape
    assert head.bytes == pytest.approx(
        rows * columns + 8 * rows + 2 * rows, rel=0.01
    )  # no masks for a whole head
    in_files = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert report.bytes < in_files < report.bytes + 65536


def test_a_sharded_checkpoint_comes_back_shard_by_shard(tmp_path):
    pruned("qwen2").save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(bytes_of(tmp_path / "dense")) > 2
    index = tmp_path / "dense" / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(b"\n", b"\r\n"))
    tawny.pack(tmp_path / "dense", tmp_path / "packed", "f32", head="f32")
    tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "dense")
    assert (tmp_path / "again" / index.name).read_bytes() == index.read_bytes()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(plain.eval(), tokens(1, 4)), logits(pruned("qwen2"), tokens(1, 4)))


def test_an_old_index_beside_one_file_counts_for_nothing(tmp_path):
    pruned("qwen2").save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    index = (tmp_path / "dense" / "model.safetensors.index.json").read_text()
    pruned("qwen2").save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(index)
    tawny.pack(tmp_path / "dense", tmp_path / "packed", "f32")
    tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert bytes_of(tmp_path / "again").keys() == {"model.safetensors"}
    assert torch.equal(
        logits(tawny.load(tmp_path / "again"), tokens(1, 4)), logits(pruned("qwen2"), tokens(1, 4))
    )


def test_what_cannot_be_opened_does_not_look_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("tawny.packed.convert._layout_of", lambda *_: ([], None))
    with pytest.raises(CheckpointError):
        tawny.pack(saved(tmp_path / "dense"), tmp_path / "packed", "f32")
    assert not (tmp_path / "packed").exists()


def test_many_small_shards_are_as_good_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tawny.packed.convert.PackedWriter", lambda path: PackedWriter(path, limit=20_000))
    dense = saved(tmp_path / "dense")
    tawny.pack(dense, tmp_path / "packed", "f32")
    assert len(bytes_of(tmp_path / "packed")) > 3
    tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(dense)
    model = tawny.load(tmp_path / "packed")
    assert model.model.layers[2].mlp.up_proj.kind == "f32"


def test_a_card_in_another_encoding_is_packed_with_its_metadata_in_front(tmp_path):
    dense = saved(tmp_path / "dense")
    (dense / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n\nCaf\xe9\n")
    tawny.pack(dense, tmp_path / "packed", "f32")
    text = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: mit\n---\n<!-- packed -->") and text.endswith("Caf\ufffd\n")


def test_packing_the_same_twice_gives_the_same_bytes(tmp_path):
    dense = saved(tmp_path / "dense")
    for name in "ab":
        tawny.pack(dense, tmp_path / name, "int8")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert (tmp_path / "a" / INDEX).read_bytes() == (tmp_path / "b" / INDEX).read_bytes()


def test_int8_comes_back_in_the_type_of_the_checkpoint(tmp_path):
    dense = saved(tmp_path / "dense", dtype=torch.bfloat16)
    tawny.pack(dense, tmp_path / "packed", "int8")
    report = tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert not report.exact
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert plain.dtype is torch.bfloat16
    assert tawny.inspect(tmp_path / "again").sparsity >= tawny.inspect(dense).sparsity


def test_packed_folders_are_inspected_profiled_and_evaluated_block_by_block(tmp_path):
    dense = saved(tmp_path / "dense", "qwen2")
    tawny.pack(dense, tmp_path / "packed", "f32", head="f32")
    ours, theirs = tawny.inspect(tmp_path / "packed"), tawny.inspect(dense)
    assert ours.linears == theirs.linears and ours.sparsity == theirs.sparsity and ours.bytes < theirs.bytes
    windows = tokens(2, 32)
    assert tawny.evaluate(tmp_path / "packed", windows).loss == tawny.evaluate(dense, windows).loss
    profiles = [tawny.profile(path, calibration=windows).to_dict() for path in (dense, tmp_path / "packed")]
    assert profiles[0]["shares"] == profiles[1]["shares"]


@pytest.mark.parametrize(
    "values,group,head", [("bf16", None, "int8"), ("f16", None, None), ("int8", 128, "f32")]
)
def test_a_reader_written_from_the_specification_alone_reads_a_folder(values, group, head, tmp_path):
    dense = saved(tmp_path / "dense", "gpt2", n_layer=1)
    tawny.pack(dense, tmp_path / "packed", values, group, head)
    checkpoint = PackedCheckpoint(tmp_path / "packed")
    found = dict(packed_folder.read(tmp_path / "packed"))
    assert len(found) == 4 + (head is not None)
    for name, rows in found.items():
        expected = checkpoint.read([name])[name].float()
        got = torch.tensor(rows)
        expected = (
            expected.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else expected
        )
        assert torch.equal(got, expected), name


@pytest.mark.parametrize(
    "values,bad,head,name",
    [
        ("f16", 7e4, None, "model.layers.1.mlp.up_proj"),
        ("int8", float("nan"), None, "model.layers.1.mlp.up_proj"),
        ("f32", 7e4, "f16", "lm_head"),
    ],
)
def test_a_weight_that_the_kind_cannot_hold_is_refused_by_name(values, bad, head, name, tmp_path):
    model = pruned("llama")
    with torch.no_grad():
        model.get_submodule(name).weight[3, 4] = bad
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(NumericalError, match=rf"^{name}: "):
        tawny.pack(tmp_path / "dense", tmp_path / "packed", values, head=head)
    assert not list(tmp_path.glob("packed*"))


def test_head_and_embedding_that_only_the_config_ties_are_packed_apart(tmp_path):
    model = tiny_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tawny.pack(tmp_path / "dense", tmp_path / "packed", "int8", head="int6", embedding="int4")
    opened = tawny.load(tmp_path / "packed")
    assert opened.get_output_embeddings().kind == "int6"
    assert opened.get_input_embeddings().__dict__["head"].kind == "int4"
    with pytest.raises(UserError, match="give --head alone"):
        tawny.pack(tmp_path / "dense", tmp_path / "no", "int8", embedding="int4")
    tiny_model("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(UserError, match="are one matrix"):
        tawny.pack(tmp_path / "tied", tmp_path / "no", "int8", head="int6", embedding="int4")


def test_the_run_json_of_others_is_left_alone_and_a_damaged_one_refused_before_the_work(tmp_path):
    dense = saved(tmp_path / "dense", "llama")
    for told in ('{"steps": 3}', "[1, 2]"):
        (dense / "run.json").write_text(told)
        tawny.pack(dense, tmp_path / "packed", overwrite=True)
        assert not (tmp_path / "packed" / "run.json").exists() and (dense / "run.json").read_text() == told
    (dense / "run.json").write_text('{"steps"')
    seen = []
    progress = Silent()
    progress.phase = lambda *told: seen.append(told)
    with pytest.raises(CheckpointError, match="is not a record of a run"):
        tawny.pack(dense, tmp_path / "again", progress=progress)
    assert not seen and not list(tmp_path.glob("again*"))


def test_a_group_of_no_columns_is_refused_whatever_the_folder_was_solved_for(tmp_path):
    dense = saved(tmp_path / "dense", "llama")
    tawny.prune(dense, tmp_path / "solved", sparsity=0.5, solver="magnitude", allocator="uniform")
    for values in (None, "int4"):
        with pytest.raises(UserError, match="group"):
            tawny.pack(tmp_path / "solved", tmp_path / "packed", values, 0)
