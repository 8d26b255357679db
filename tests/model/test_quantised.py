"""Checkpoints that other libraries quantised: read as what they mean, pruned, packed, and refused where they are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tawny
from tawny.errors import CheckpointError, ModelError
from tawny.model.checkpoint import Checkpoint
from tawny.model.quantised import READERS
from tawny.packed.opening import open_stack
from tests.model.formats import FORMATS, quantised, table
from tests.tiny import tokens

UNIFORM = {"sparsity": 0.5, "allocator": "uniform", "solver": "magnitude"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a format and the weights it stands for; made once."""
    made = {}

    def write(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("quantised") / "model"
            made[name] = (folder, quantised(folder, FORMATS[name]))
        return made[name]

    return write


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_pruned_and_written_as_the_weights_it_stands_for(name, written, tmp_path):
    folder, expected = written(name)
    checkpoint, stored = Checkpoint(folder), load_file(folder / "model.safetensors")
    read = checkpoint.read(expected)
    for key, value in expected.items():
        torch.testing.assert_close(read[key], value, rtol=max(1e-6, FORMATS[name].rounding), atol=1e-7)
        assert checkpoint.shapes[key] == tuple(value.shape)
    plain = checkpoint.files.keys() - expected.keys()
    assert plain and all(torch.equal(checkpoint.read([key])[key], stored[key]) for key in plain)
    assert FORMATS[name].says in tawny.inspect(folder).stored

    record = tawny.prune(folder, tmp_path / "pruned", **UNIFORM)
    assert record.sparsity >= 0.5 and "is written dense" in record.warnings[0]
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    pruned = load_file(tmp_path / "pruned" / "model.safetensors")
    assert pruned.keys() == checkpoint.files.keys()
    for key, value in read.items():
        kept = pruned[key] != 0 if ".layers." in key else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(pruned[key][kept], value[kept]) and kept.any()
        assert ".layers." not in key or not kept.all()

    assert tawny.pack(tmp_path / "pruned", tmp_path / "packed", "f32").packed > 0
    tawny.unpack(tmp_path / "packed", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(dense[key], value) for key, value in pruned.items())

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    found = dict(theirs.named_parameters())
    if read.keys() <= found.keys():
        theirs.load_state_dict(checkpoint.read(checkpoint.files), strict=False)
        with torch.no_grad():
            torch.testing.assert_close(tawny.load(folder)(tokens()).logits, theirs(tokens()).logits)


def test_transformers_decodes_blocks_of_fp8_to_the_same_bits(written):
    folder, expected = written("FP8, experts")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = tawny.load(folder).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(expected) > len(theirs) / 2


def test_whatever_opens_a_model_opens_a_quantised_one(written, tmp_path, run):
    folder, _ = written("FP8, blocks")
    plan = tawny.plan(folder, **UNIFORM)
    dense = sum(value.numel() * 4 for value in tawny.load(folder).state_dict().values())
    assert plan.disk["checkpoint"] == dense > folder.joinpath("model.safetensors").stat().st_size
    assert "is written dense" in plan.notes[0]
    loss = tawny.evaluate(folder, tokens()).loss
    assert tawny.pack(folder, tmp_path / "packed", "f32").packed == 0  # nothing is zero: all stays dense
    tawny.unpack(tmp_path / "packed", tmp_path / "dense")
    assert {tawny.evaluate(tmp_path / name, tokens()).loss for name in ("packed", "dense")} == {loss}
    code, out, _ = run("inspect", folder)
    assert code == 0 and "stored as float8 e4m3, blocks of 40×48" in " ".join(out.split())
    tawny.prune(folder, tmp_path / "pruned", **UNIFORM)
    tawny.recover(
        tmp_path / "pruned",
        folder,
        tmp_path / "recovered",
        text=tokens(),
        held_out=tokens(seed=1),
        tokens=48,
        batch=1,
    )
    assert tawny.inspect(tmp_path / "recovered").zeros == tawny.inspect(tmp_path / "pruned").zeros


def damaged(folder: Path, copy: Path, change) -> Path:
    """A copy of a folder with some tensors changed."""
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("name", FORMATS)
def test_a_part_that_is_missing_or_misshapen_is_refused_by_name(name, written, tmp_path):
    folder, _ = written(name)
    coded = Checkpoint(folder).coded
    weight = max(coded)
    for role, part in coded[weight].parts.items():
        if role != "g_idx" or "desc_act" in name:
            gone = damaged(folder, tmp_path / f"without {role}", lambda tensors, part=part: tensors.pop(part))
            with pytest.raises(CheckpointError) as caught:
                open_stack(gone, torch.float32)
            assert weight.removesuffix("weight") in str(caught.value) and "\n" not in str(caught.value)

        def cut(tensors, part=part):
            value = tensors[part]
            tensors[part] = value[:-1].contiguous() if value.dim() and len(value) > 1 else torch.ones(2, 3)

        short = damaged(folder, tmp_path / f"short {role}", cut)
        with pytest.raises(CheckpointError) as caught:
            open_stack(short, torch.float32)
        assert weight.removesuffix("weight") in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_file_is_refused_by_name(written, tmp_path):
    folder = shutil.copytree(written("GPTQ, 4 bits")[0], tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        tawny.prune(folder, tmp_path / "out", **UNIFORM)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("group", [-1, 3])
def test_an_input_in_a_group_that_has_no_scale_is_refused(group, written, tmp_path):
    def change(tensors):
        name = next(key for key in tensors if key.endswith("g_idx"))
        tensors[name][5] = group

    folder = damaged(written("GPTQ, `desc_act`")[0], tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=r"g_idx' names a group that has no scale"):
        tawny.prune(folder, tmp_path / "out", **UNIFORM)


@pytest.mark.parametrize(
    ("name", "changes", "said", "kind"),
    [
        ("AWQ", {"version": "gemv"}, "layout 'gemv'", CheckpointError),
        ("GPTQ, 4 bits", {"checkpoint_format": "marlin"}, "layout 'marlin'", CheckpointError),
        (
            "GPTQ, 4 bits",
            {"group_size": "all"},
            "group_size of quantization_config is 'all'",
            CheckpointError,
        ),
        ("FP8, blocks", {"quant_method": "fp9"}, r"is quantised \(fp9\).*did you mean 'fp8'", ModelError),
        ("FP8, blocks", {"quant_method": "gptq"}, "holds no such weight", CheckpointError),
    ],
)
def test_settings_that_are_not_read_are_refused_in_one_line(name, changes, said, kind, written, tmp_path):
    folder = shutil.copytree(written(name)[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=said) as caught:
        tawny.prune(folder, tmp_path / "out", **UNIFORM)
    assert "\n" not in str(caught.value)


def test_inputs_in_the_order_of_their_activations_keep_their_groups(written, tmp_path):
    source, expected = written("compressed-tensors, int4")
    name = max(expected)
    stem = name.removesuffix("weight")
    inputs = expected[name].shape[1]
    groups = (torch.arange(inputs) // 32)[torch.randperm(inputs, generator=torch.Generator().manual_seed(0))]
    folder = damaged(
        source, tmp_path / "model", lambda tensors: tensors.update({f"{stem}weight_g_idx": groups.int()})
    )
    scales = load_file(folder / "model.safetensors")[f"{stem}weight_scale"]
    whole = (expected[name] / scales.repeat_interleave(32, 1)).round()
    torch.testing.assert_close(Checkpoint(folder).read([name])[name], whole * scales[:, groups])


@pytest.mark.parametrize("ordered", [True, False])
def test_groups_of_eight_bits_out_of_order_are_refused(ordered, written, tmp_path):
    source, expected = written("compressed-tensors, int8")
    name = max(expected)
    groups = torch.arange(expected[name].shape[1]) // 32
    order = (groups if ordered else groups.flip(0)).int()
    stem = name.removesuffix("weight")
    folder = damaged(
        source, tmp_path / "model", lambda tensors: tensors.update({f"{stem}weight_g_idx": order})
    )
    if ordered:
        assert torch.equal(Checkpoint(folder).read([name])[name], expected[name])
        return
    with pytest.raises(CheckpointError, match="groups out of order"):
        tawny.prune(folder, tmp_path / "out", **UNIFORM)


def test_settings_of_older_tools_lie_in_a_file_of_their_own(written, tmp_path):
    folder = shutil.copytree(written("GPTQ, 4 bits")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    del settings["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    tawny.prune(folder, tmp_path / "out", **UNIFORM)
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_every_reader_is_tried():
    assert {form.settings["quant_method"] for form in FORMATS.values()} | {"mxfp8"} == set(READERS)


def test_the_page_lists_the_formats_that_are_tried():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = page.partition("## Formats")[2].partition("## What is not")[0].splitlines()
    assert [row for row in rows if "| yes | yes | dense, packed |" in row and "| – |" not in row] == table()
