"""What the matrices of a GGUF file hold: what was solved, or the best rounding of their type."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

import tawny
from tawny.errors import CheckpointError, ModelError, OutputError, UserError
from tawny.exporting.architectures import ARCHITECTURES
from tawny.exporting.template import Matrices, Template, file_type
from tawny.exporting.through import export_through
from tawny.gguf_kinds import ENCODED, GGUF_KINDS
from tawny.model.tensorfile import read_tensors, write_tensors
from tawny.progress import Silent
from tests.exporting.test_gguf import cache, change, contents, saved, words  # noqa: F401
from tests.exporting.test_template import raw, write
from tests.tiny import tiny_model, tokens

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def solved(tmp_path: Path, values, **changes) -> Path:
    folder = saved(tmp_path / "model", "llama", **{"num_hidden_layers": 1, **changes})
    keys = {"sparsity": 0.0, "solver": "sparsegpt", "calibration": tokens(4, 24)}
    tawny.prune(folder, tmp_path / "solved", values=values, **keys)
    return tmp_path / "solved"


def test_what_was_solved_is_copied(words, tmp_path):  # noqa: F811
    folder = solved(tmp_path, "q4_k")
    report = tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    encoded, found = read_tensors(folder / ENCODED), raw(tmp_path / "m.gguf")
    assert len(encoded) == len(NAMES) and report.types == {"Q5_0": 7, "Q8_0": 2, "F32": 7}
    for theirs, ours in NAMES.items():
        name = f"blk.0.{theirs}.weight"
        rows = encoded[f"model.layers.0.{ours}.q5_0"]
        rows = ARCHITECTURES["llama"].changed(name, rows, 4, 2) if theirs in ("attn_q", "attn_k") else rows
        assert found[name] == ("Q5_0", rows.numpy().tobytes())
    weights = load_file(folder / "model.safetensors")
    down = contents(tmp_path / "m.gguf")["blk.0.ffn_down.weight"]
    assert torch.equal(down, weights["model.layers.0.mlp.down_proj.weight"])
    assert [x.name for x in tmp_path.glob("m.gguf*")] == ["m.gguf"]
    # Through the file of the dense model, and with the type itself given.
    tawny.export(tmp_path / "model", tmp_path / "whole.gguf", tokenizer_from=words)
    tawny.export(folder, tmp_path / "through.gguf", template=tmp_path / "whole.gguf")
    tawny.export(folder, tmp_path / "typed.gguf", type="q5_0", tokenizer_from=words)
    assert raw(tmp_path / "through.gguf") == raw(tmp_path / "typed.gguf") == found
    # A template whose matrices are known already.
    dense = Matrices.of(tmp_path / "model")
    opened = Template.of(tmp_path / "whole.gguf", dense.checkpoint, dense.model, dense.names)
    export_through(folder, tmp_path / "known.gguf", template=opened)
    assert (tmp_path / "known.gguf").read_bytes() == (tmp_path / "through.gguf").read_bytes()
    few = Template.of(tmp_path / "whole.gguf", dense.checkpoint, dense.model, dense.names[:3])
    with pytest.raises(ModelError, match=r"has no place for 'lm_head.weight', which changed"):
        export_through(folder, tmp_path / "few.gguf", template=few)


def test_what_was_trained_since_is_rounded_anew(words, tmp_path):  # noqa: F811
    folder, said = solved(tmp_path, "q4_0"), Said()
    tawny.export(folder, tmp_path / "before.gguf", tokenizer_from=words)
    for name in ("mlp.up_proj", "self_attn.q_proj"):
        change(folder, f"model.layers.0.{name}.weight", 0.123)
    report = tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words, progress=said)
    assert report.types["Q4_0"] == 7
    assert [x for x in said.lines if "anew" in x] == [
        "2 of the matrices changed since they were solved for GGUF, and are rounded anew by best scales"
    ]
    before, after = raw(tmp_path / "before.gguf"), raw(tmp_path / "m.gguf")
    differing = {name for name in before if before[name] != after[name]}
    assert differing <= {"blk.0.ffn_up.weight", "blk.0.attn_q.weight"} and differing


@pytest.mark.parametrize(
    ("values", "tied", "types"),
    [
        ({"kind": "q4_0", "head": "q5_0"}, False, ("Q5_0", "Q5_0")),
        ({"kind": "q4_0", "head": "q5_1", "embedding": "q4_1"}, False, ("Q4_1", "Q5_1")),
        ({"kind": "q4_0", "head": "q5_1"}, True, ("Q5_1", None)),
        ({"kind": "q4_0", "head": "int8"}, False, ("Q8_0", "Q8_0")),
    ],
)
def test_embedding_and_head_get_the_kinds_of_the_recipe(values, tied, types, words, tmp_path):  # noqa: F811
    folder = solved(tmp_path, values, tie_word_embeddings=tied)
    tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    found = raw(tmp_path / "m.gguf")
    ends = tuple(found.get(name, (None,))[0] for name in ("token_embd.weight", "output.weight"))
    assert ends == types and found["blk.0.ffn_up.weight"][0] == "Q4_0"
    encoded = read_tensors(folder / ENCODED)
    solved_ends = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    for key, rows in encoded.items():
        if (name := solved_ends.get(key.rpartition(".")[0])) is not None:
            assert found[name][1] == rows.numpy().tobytes()


@pytest.mark.parametrize("kind", GGUF_KINDS.values(), ids=GGUF_KINDS)
def test_every_type_is_written(kind, words, tmp_path):  # noqa: F811
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    folder, said = saved(tmp_path / "model", "llama", **wide), Said()
    change(folder, "model.layers.0.mlp.down_proj.weight", 0.0)
    out = tmp_path / "m.gguf"
    report = tawny.export(folder, out, type=kind.name, tokenizer_from=words, progress=said)
    end = kind.type if kind.bits > GGUF_KINDS["q6_k"].bits else "Q6_K"
    found = raw(out)
    assert found["blk.0.attn_q.weight"][0] == kind.type and found["token_embd.weight"][0] == end
    assert GGUFReader(str(out)).fields["general.file_type"].contents() == file_type(kind.type)
    assert report.zeros == kind.zero
    weights, now = load_file(folder / "model.safetensors"), contents(out)
    down = weights["model.layers.0.mlp.down_proj.weight"]
    off = (now["blk.0.ffn_down.weight"] - down).square().sum() / down.square().sum()
    assert off < 20 * 4**-kind.bits
    assert not kind.zero or now["blk.0.ffn_down.weight"][3, 5] == 0
    tawny.prune(folder, tmp_path / "pruned", sparsity=0.5, allocator="uniform", solver="magnitude")
    if kind.zero:
        report = tawny.export(tmp_path / "pruned", out, type=kind.type, tokenizer_from=words, overwrite=True)
        pruned = load_file(tmp_path / "pruned" / "model.safetensors")
        assert report.zeros == sum(int((x == 0).sum()) for x in pruned.values() if x.dim() > 1)
    else:
        with pytest.raises(
            UserError,
            match=f"50% of the weights are zeros, which {kind.type} does not hold; give.*Q8_0, Q6_K, Q5_0",
        ):
            tawny.export(tmp_path / "pruned", tmp_path / "no.gguf", type=kind.type, tokenizer_from=words)
        assert not list(tmp_path.glob("no.gguf*"))


def test_a_width_that_a_type_does_not_take_gets_another(words, tmp_path):  # noqa: F811
    folder, said = saved(tmp_path / "model", "llama", num_hidden_layers=1, intermediate_size=80), Said()
    report = tawny.export(folder, tmp_path / "m.gguf", type="Q4_K", tokenizer_from=words, progress=said)
    assert report.types == {"F32": 7, "F16": 1, "Q5_0": 6, "Q8_0": 2}
    assert sorted(x for x in said.lines if "get" in x) == [
        "1 of the matrices get F16: Q4_K has blocks of 256 columns, which do not divide their width",
        "6 of the matrices get Q5_0: Q4_K has blocks of 256 columns, which do not divide their width",
    ]


def weighed(path: Path, energies: dict[str, torch.Tensor]) -> Path:
    writer = gguf.GGUFWriter(str(path), "")
    for name, rows in energies.items():
        writer.add_tensor(f"{name}.in_sum2", rows.numpy())
        writer.add_tensor(f"{name}.counts", np.ones((len(rows), 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_importance_matrix_says_which_inputs_count(words, tmp_path, run):  # noqa: F811
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    name, key = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
    energies = torch.rand(64).pow(8)
    energies[:7] = 0
    imatrix = weighed(tmp_path / "i.gguf", {name: energies[None]})
    tawny.export(folder, tmp_path / "alike.gguf", type="Q4_0", tokenizer_from=words)
    code, _, err = run(
        "export", folder, "--to", "gguf", "--out", tmp_path / "m.gguf", "--type", "q4_0", "--imatrix", imatrix,
        "--tokenizer-from", words, "--json",
    )  # fmt: skip
    assert code == 0, err
    before, after = raw(tmp_path / "alike.gguf"), raw(tmp_path / "m.gguf")
    assert [x for x in before if before[x] != after[x]] == [name]
    weight = load_file(folder / "model.safetensors")[key]

    def lost(path: Path) -> float:
        return float(((contents(path)[name] - weight).square() * energies).sum())

    assert lost(tmp_path / "m.gguf") < 0.9 * lost(tmp_path / "alike.gguf")


def test_each_expert_has_its_own_importances(tmp_path):
    model = tiny_model("qwen3_moe", intermediate_size=64, moe_intermediate_size=32, hidden_size=64)
    model.save_pretrained(tmp_path / "model")
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    path = write(tmp_path / "whole.gguf", tensors)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    name = name if name in tensors else next(x for x in tensors if x.endswith("experts.gate_up_proj"))
    energies = torch.ones(len(tensors[name]), 64)
    energies[2] = torch.rand(64).pow(8)
    imatrix = weighed(tmp_path / "i.gguf", {name: energies})
    for out, given in (("alike", None), ("m", imatrix)):
        tawny.export(tmp_path / "model", tmp_path / f"{out}.gguf", type="Q4_0", template=path, imatrix=given)
    before, after = (contents(tmp_path / f"{x}.gguf")[name] for x in ("alike", "m"))
    assert [bool((before[i] != after[i]).any()) for i in range(len(before))] == [
        i == 2 for i in range(len(before))
    ]


def test_wrong_files_and_options_are_refused_in_one_line(words, tmp_path):  # noqa: F811
    folder, out = solved(tmp_path, "q4_0"), tmp_path / "m.gguf"
    encoded, dense = read_tensors(folder / ENCODED), tmp_path / "model"
    name = "model.layers.0.mlp.up_proj.q4_0"
    good = {"blk.0.ffn_up.weight": torch.ones(1, 64)}
    imatrices = [
        weighed(tmp_path / f"{i}.gguf", energies)
        for i, energies in enumerate(
            [good, {"blk.9.ffn_up.weight": torch.ones(1, 64)}, {"blk.0.ffn_up.weight": torch.ones(1, 32)}]
        )
    ]
    cases = [
        (
            dense,
            {"imatrix": imatrices[0]},
            UserError,
            "--imatrix weighs what rounding loses: give --type too",
        ),
        (dense, {"imatrix": imatrices[0], "type": "f16"}, UserError, "weighs what rounding loses"),
        (dense, {"imatrix": imatrices[1], "type": "q4_0"}, CheckpointError, "names no tensor of the file"),
        (
            dense,
            {"imatrix": imatrices[2], "type": "q4_0"},
            CheckpointError,
            r"numbers \[32\] for 'blk.0.ffn_up",
        ),
        (dense, {"imatrix": words, "type": "q4_0"}, CheckpointError, "holds no importance matrix"),
    ]
    with pytest.raises(OutputError, match="a source is never overwritten"):
        tawny.export(
            dense, imatrices[0], type="q4_0", imatrix=imatrices[0], tokenizer_from=words, overwrite=True
        )
    for source, options, error, said in cases:
        with pytest.raises(error, match=said) as caught:
            tawny.export(source, out, tokenizer_from=words, **options)
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("m.gguf*"))
    for wrong, said in (
        (encoded | {"model.layers.7.mlp.up_proj.q4_0": encoded[name]}, "is not of the model beside it"),
        (encoded | {name: encoded[name][:-1]}, r"holds U8 \[95, 36\] of .*up_proj'; expected U8 \[96, 36\]"),
    ):
        write_tensors(folder / ENCODED, wrong)
        with pytest.raises(CheckpointError, match=said) as caught:
            tawny.export(folder, out, tokenizer_from=words)
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("m.gguf*"))


def test_experts_that_were_solved_are_copied_slice_by_slice(tmp_path):
    model = tiny_model("qwen3_moe", intermediate_size=64, moe_intermediate_size=32, hidden_size=64)
    model.save_pretrained(tmp_path / "model")
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    path = write(tmp_path / "whole.gguf", tensors, "F16")
    keys = {"sparsity": 0.0, "solver": "magnitude", "calibration": tokens(2, 24)}
    tawny.prune(tmp_path / "model", tmp_path / "solved", values="q4_0", **keys)
    tawny.export(tmp_path / "solved", tmp_path / "m.gguf", template=path)
    encoded, found = read_tensors(tmp_path / "solved" / ENCODED), raw(tmp_path / "m.gguf")
    fused = next(name for name in tensors if name.endswith("experts.gate_up_proj"))
    rows = [encoded[f"{fused}.{expert}.q4_0"].numpy().tobytes() for expert in range(len(tensors[fused]))]
    assert found[fused] == ("Q4_0", b"".join(rows))
