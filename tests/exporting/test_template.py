"""GGUF files as templates: what is found in them by value, what is kept, and how large what is written is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from safetensors.torch import load_file, save_file

import tawny
from tawny.errors import CheckpointError, ModelError, OutputError, UserError
from tawny.exporting.matching import digests, match
from tawny.exporting.template import Matrices, Payload, Template
from tawny.gguf_kinds import GGUF_KINDS
from tawny.solvers.block_grid import BlockGrid
from tests.exporting.test_gguf import cache, contents, saved, words  # noqa: F401
from tests.tiny import tiny_model

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def matched(path: Path, folder: Path, names: list[str] | None = None) -> tuple[Template, Matrices]:
    source = Matrices.of(folder)
    names = names or [*source.linears, *filter(None, (source.embedding, source.head))]
    return Template.of(path, source.checkpoint, source.model, names), source


def encoded(source: Matrices, name: str, kind: str) -> Payload:
    def rows() -> np.ndarray:
        values = source.read(name).float().contiguous().numpy()
        return quantize(values, GGMLQuantizationType[kind]).view(np.uint8).reshape(len(values), -1)

    return Payload(kind, rows)


def best(source: Matrices, name: str, kind: str) -> Payload:
    """As exports round."""
    grid, W = BlockGrid(GGUF_KINDS[kind.lower()]), source.read(name).float().contiguous()
    return Payload(kind, lambda: grid.encoded(W, grid.fit(W)).numpy())


def raw(path: Path) -> dict[str, tuple[str, bytes]]:
    return {x.name: (x.tensor_type.name, x.data.tobytes()) for x in GGUFReader(str(path)).tensors}


def keys(path: Path) -> dict[str, list[bytes]]:
    ours = ("general.file_type", "general.quantization_version", "GGUF.kv_count")
    fields = GGUFReader(str(path)).fields
    return {k: [part.tobytes() for part in field.parts] for k, field in fields.items() if k not in ours}


def write(path: Path, tensors: dict[str, np.ndarray], kind: str = "F32", align: int | None = None) -> Path:
    """A file of an architecture that nobody knows; matrices have a type, in the order in which they are given."""
    writer = GGUFWriter(str(path), "made-up")
    if align:
        writer.add_custom_alignment(align)
    writer.add_array("made-up.list", [3, 1, 2])
    writer.add_string("tokenizer.ggml.pre", "split")
    for name, values in tensors.items():
        own = kind if values.ndim > 1 else "F32"
        data = quantize(np.ascontiguousarray(values, np.float32), GGMLQuantizationType[own])
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_every_matrix_is_found_whatever_the_template_is_rounded_to(family, kind, words, tmp_path):  # noqa: F811
    folder = saved(tmp_path / "model", family)
    path = tmp_path / "whole.gguf"
    tawny.export(folder, path, type="F32" if kind == "Q8_0" else kind, tokenizer_from=words)
    template, source = matched(path, folder)
    if kind == "Q8_0":  # as llama.cpp's converter rounds
        path = tmp_path / "rounded.gguf"
        template.fill(path, {name: encoded(source, name, kind) for name in template.places})
        template, source = matched(path, folder)
    payloads = {name: best(source, name, "Q5_0") for name in template.places}
    assert template.bytes_with({}) == path.stat().st_size
    kinds = dict.fromkeys(payloads, "Q5_0")
    sizes = template.rest + sum(template.size_of(name, "Q5_0") for name in payloads)
    types = template.fill(tmp_path / "small.gguf", payloads)
    assert template.bytes_with(kinds) == sizes == (tmp_path / "small.gguf").stat().st_size
    assert types["Q5_0"] == len(payloads) and sum(types.values()) == len(raw(path))
    # Our own export permutes rows by the architecture's name.
    tawny.export(folder, tmp_path / "known.gguf", type="Q5_0", tokenizer_from=words)
    found, known, before = (raw(tmp_path / name) for name in ("small.gguf", "known.gguf", path.name))
    assert list(found) == list(before) and keys(tmp_path / "small.gguf") == keys(path)
    for name, (type, data) in found.items():
        if type != "Q5_0":
            assert (type, data) == before[name]
        elif name not in ("token_embd.weight", "output.weight"):
            assert (type, data) == known[name]
    fields = GGUFReader(str(tmp_path / "small.gguf")).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q5_0
    permuted = [name for name, places in template.places.items() if places[0].order is not None]
    assert bool(permuted) == (family == "llama") and all(x.endswith(("q_proj", "k_proj")) for x in permuted)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=list(FLOATS))
def test_a_template_that_was_rounded_from_the_folder_fits_it(kind, dtype, tmp_path):
    model = tiny_model("gpt2", dtype=dtype)  # whose linears are stored `[in, out]`
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:4] *= 1e-5  # F16 hardly holds it
    model.save_pretrained(tmp_path / "model")
    source = Matrices.of(tmp_path / "model")
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    tensors = {name: source.read(name).float().numpy() for name in (*source.linears, source.embedding)}
    mixed = "transformer.h.2.attn.c_attn"
    tensors[mixed] = tensors[mixed][order]
    path = write(tmp_path / "whole.gguf", tensors, kind)
    template, _ = matched(path, tmp_path / "model")
    assert template.places[mixed][0].order.tolist() == order.tolist()
    assert all(places[0].slot == (name, 0) for name, places in template.places.items())
    # The other way round: what was opened from a file fits it.
    for name, values in contents(path).items():
        if name != mixed:
            tensors[name] = values.to(torch.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name in source.linears:
        if name != mixed:
            stored[source.key(name)] = tensors[name].T.contiguous()
    stored[source.key(mixed)] = contents(path)[mixed].to(torch.bfloat16)[torch.argsort(order)].T.contiguous()
    stored[source.embedding] = tensors[source.embedding]
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    template, _ = matched(path, tmp_path / "model")
    assert template.places[mixed][0].order.tolist() == order.tolist()


@pytest.mark.parametrize("align", [None, 64])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_experts_are_found_slice_by_slice_and_halves_together(kind, align, tmp_path):
    model = tiny_model(
        "qwen3_moe", intermediate_size=64, moe_intermediate_size=32, hidden_size=64, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "model")
    source = Matrices.of(tmp_path / "model")
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        if name.endswith("gate_up_proj"):  # gates first, and their rows in another order than here
            tensors |= {f"{name}_gate": values[:, :32], f"{name}_up": values[:, :31:-1]}
        else:
            tensors[name] = values
    path = write(tmp_path / "whole.gguf", tensors, kind, align)
    template, source = matched(path, tmp_path / "model")
    assert template.architecture == "made-up"
    experts = [name for name in template.places if ".experts." in name]
    assert len(experts) == 2 * 2 * 4 and len(template.alike) == 4
    payloads = {name: encoded(source, name, "Q4_0") for name in experts}
    kinds = dict.fromkeys(experts, "Q4_0")
    types = template.fill(tmp_path / "small.gguf", payloads)
    assert template.bytes_with(kinds) == (tmp_path / "small.gguf").stat().st_size and types["Q4_0"] == 6
    found = contents(tmp_path / "small.gguf")
    fused = model.model.layers[2].mlp.experts.gate_up_proj.detach().float()
    expected = torch.from_numpy(
        dequantize(quantize(fused.numpy(), GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    )
    name = "model.layers.2.mlp.experts.gate_up_proj"
    assert torch.equal(found[f"{name}_gate"], expected[:, :32])
    assert torch.equal(found[f"{name}_up"], expected[:, 32:].flip(1))
    assert (keys(path), GGUFReader(str(path)).alignment) == (keys(tmp_path / "small.gguf"), align or 32)
    with pytest.raises(ModelError, match=r"several types \(Q4_0, none\); expected one for all"):
        template.fill(tmp_path / "few.gguf", dict(itertools.islice(payloads.items(), 3)))
    with pytest.raises(ModelError, match=r"3 of the 4 matrices in .* are wanted.*choose all or none"):
        matched(path, tmp_path / "model", [x for x in source.linears if not x.endswith("down_proj.3")])
    assert not (tmp_path / "few.gguf").exists()


def test_equal_rows_keep_their_order():
    rows = digests(np.array([[1], [2], [1], [3]], np.uint8))
    (place,) = match({"w": rows}, {("t", 0): rows[[3, 0, 2, 1]]}, {})["w"]
    assert place.order.tolist() == [3, 0, 2, 1]
    assert match({"w": rows}, {("t", 0): rows[:3]}, {}) == {}
    halves = {("a", 0): rows[2:], ("b", 0): rows[:2]}
    assert [place.order.tolist() for place in match({"w": rows}, halves, {})["w"]] == [[0, 3], [2, 1]]


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_the_head_is_one_matrix_however_often_it_is_stored(tied, tmp_path):
    model = tiny_model("qwen3", tie_word_embeddings=tied, num_hidden_layers=1, intermediate_size=64)
    if not tied:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(tmp_path / "model")
    source = Matrices.of(tmp_path / "model")
    tensors = {name: source.read(name).float().numpy() for name in source.linears}
    whole = source.read(source.embedding).float().numpy()
    once = write(tmp_path / "once.gguf", tensors | {"token_embd.weight": whole})
    twice = write(tmp_path / "twice.gguf", {"output.weight": whole, **tensors, "token_embd.weight": whole})
    template, _ = matched(twice, tmp_path / "model")
    slots = {name: [place.slot[0] for place in template.places[name]] for name in template.places}
    both = ["output.weight", "token_embd.weight"]
    assert slots[source.embedding] == (both if tied else ["token_embd.weight"])
    assert tied or slots["lm_head.weight"] == ["output.weight"]
    assert template.bytes_with({source.embedding: "Q8_0"}) < template.bytes_with({})
    template, _ = matched(once, tmp_path / "model")
    assert [place.slot[0] for place in template.places[source.embedding]] == ["token_embd.weight"]
    assert tied or template.places["lm_head.weight"] == []
    payloads = {name: encoded(source, name, "Q8_0") for name in template.places}
    template.fill(tmp_path / "small.gguf", payloads)
    kinds = dict.fromkeys(payloads, "Q8_0")
    assert template.bytes_with(kinds) == (tmp_path / "small.gguf").stat().st_size


def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(words, tmp_path):  # noqa: F811
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=2)
    path = tmp_path / "whole.gguf"
    tawny.export(folder, path, tokenizer_from=words)
    other = saved(tmp_path / "other", "llama", num_hidden_layers=2)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj"
    tensors[f"{name}.weight"][3, 5] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    few = tmp_path / "few.gguf"
    tawny.export(folder, few, type="Q4_0", tokenizer_from=words)
    twice = saved(tmp_path / "twice", "llama", num_hidden_layers=2)
    tensors[f"{name}.weight"] = tensors["model.layers.0.self_attn.v_proj.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    tawny.export(twice, tmp_path / "twice.gguf", tokenizer_from=words)
    out = tmp_path / "out.gguf"
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    cases = [
        (
            other,
            path,
            ModelError,
            f"holds no tensor with the values of '{name}'; expected a template of the same model",
        ),
        (
            folder,
            few,
            ModelError,
            r"few.gguf is already quantised \('.*' is Q[48]_0\); expected a template of F32",
        ),
        (
            twice,
            tmp_path / "twice.gguf",
            ModelError,
            "could be 'blk.[01].attn_v.weight' or 'blk.[01].attn_v.weight'",
        ),
        (twice, path, ModelError, "hold the same values"),
        (folder, tmp_path / "no.gguf", CheckpointError, "cannot be opened as a GGUF model"),
        (folder, tmp_path / "absent.gguf", UserError, "expected a GGUF file"),
        (folder, folder, UserError, "expected a GGUF file"),
    ]
    for source, template, error, said in cases:
        with pytest.raises(error, match=said) as caught:
            tawny.export(source, out, template=template)
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))
    with pytest.raises(UserError, match="brings its own tokenizer"):
        tawny.export(folder, out, template=path, tokenizer_from=words)
    with pytest.raises(OutputError, match="a source is never overwritten"):
        tawny.export(folder, path, template=path, overwrite=True)
    template, source = matched(path, folder)
    with pytest.raises(OutputError, match="is the template itself"):
        template.fill(path, {})
    narrow = saved(tmp_path / "narrow", "llama", intermediate_size=80)
    tawny.export(narrow, tmp_path / "narrow.gguf", tokenizer_from=words)
    down = "model.layers.0.mlp.down_proj"
    with pytest.raises(ModelError, match=f"'{down}' is 80 wide, which Q4_K does not take"):
        matched(tmp_path / "narrow.gguf", narrow)[0].size_of(down, "Q4_K")
    with pytest.raises(UserError, match="'Q9' is not a GGUF type"):
        template.size_of(down, "Q9")
    with pytest.raises(ModelError, match=r"'nothing' is not a matrix of"):
        matched(path, folder, ["nothing"])
    with pytest.raises(
        CheckpointError, match=r"payload of 'blk.0.ffn_down.weight' is uint8 \[64, 1\]; expected"
    ):
        template.fill(out, {down: Payload("Q8_0", lambda: np.zeros((64, 1), np.uint8))})
    assert not list(tmp_path.glob("out*"))


def test_keys_that_a_template_lacks_are_added(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    source = Matrices.of(tmp_path / "model")
    tensors = {name: source.read(name).float().numpy() for name in source.linears}
    path = write(tmp_path / "whole.gguf", tensors)
    assert "general.file_type" not in GGUFReader(str(path)).fields
    names = list(source.linears)
    template, _ = matched(path, tmp_path / "model", names)
    template.fill(tmp_path / "out.gguf", {})
    fields = GGUFReader(str(tmp_path / "out.gguf")).fields
    assert fields["general.file_type"].contents() == 0
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert template.bytes_with({}) == (tmp_path / "out.gguf").stat().st_size
    assert raw(path) == raw(tmp_path / "out.gguf") and keys(path) == keys(tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_pruned_folder_fills_the_template_of_the_model_it_was_made_from(kind, tmp_path, run):
    folder = tmp_path / "model"
    model = tiny_model(
        "qwen3_moe", intermediate_size=64, moe_intermediate_size=32, hidden_size=64, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tensors = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
    tensors["in halves"] = tensors.pop("model.layers.0.self_attn.q_proj.weight").reshape(64, 32)
    path = write(tmp_path / "whole.gguf", tensors, kind)
    tawny.prune(
        folder,
        tmp_path / "pruned",
        sparsity=0.5,
        allocator="uniform",
        solver="magnitude",
        exclude=["q_proj"],
    )
    code, out, err = run(
        "export",
        tmp_path / "pruned",
        "--to",
        "gguf",
        "--out",
        tmp_path / "small.gguf",
        "--template",
        path,
        "--json",
    )
    assert code == 0, err
    report = json.loads(out)
    found, before = raw(tmp_path / "small.gguf"), raw(path)
    assert {name for name in found if found[name] != before[name]} == {
        x for x in before if "experts." in x or x.endswith(("k_proj.weight", "v_proj.weight", "o_proj.weight"))
        or ("mlp." in x and ".1." in x)
    }  # fmt: skip
    assert all(found[name][0] == before[name][0] for name in before)
    assert report["architecture"] == "made-up" and report["tokenizer"] == str(path)
    pruned = load_file(tmp_path / "pruned" / "model.safetensors")
    zeros = sum(int((value == 0).sum()) for value in pruned.values() if value.dim() > 1)
    assert report["zeros"] == zeros and report["bytes"] == (tmp_path / "small.gguf").stat().st_size
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(contents(tmp_path / "small.gguf")[name] == 0, pruned[name] == 0) or kind == "Q8_0"
    with pytest.raises(ModelError, match=r"no tensor with the values of 'model.layers.0.self_attn.q_proj'"):
        tawny.export(tmp_path / "pruned", tmp_path / "all.gguf", type="Q5_0", template=path)
    # A type for all, also from the folder packed.
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors.pop("in halves").reshape(32, 64)
    write(path, tensors, kind)
    tawny.pack(tmp_path / "pruned", tmp_path / "packed", "bf16")
    for source in ("pruned", "packed"):
        report = tawny.export(tmp_path / source, tmp_path / f"{source}.gguf", type="Q5_0", template=path)
        assert report.types["Q5_0"] > 10
    assert (tmp_path / "pruned.gguf").read_bytes() == (tmp_path / "packed.gguf").read_bytes()


def test_a_change_that_a_template_would_lose_is_refused(words, tmp_path):  # noqa: F811
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    path = tmp_path / "whole.gguf"
    tawny.export(folder, path, tokenizer_from=words)
    changed = saved(tmp_path / "changed", "llama", num_hidden_layers=1)
    (changed / "run.json").write_text(json.dumps({"record_version": 1, "source": str(folder)}))
    tawny.export(changed, tmp_path / "same.gguf", template=path)
    assert raw(tmp_path / "same.gguf") == raw(path)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"'model.norm.weight' of .*changed is not as in .*model, and a template"
    ):
        tawny.export(changed, tmp_path / "m.gguf", template=path)
    (changed / "run.json").write_text(json.dumps({"record_version": 1, "source": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match=r"was made from .*gone.* cannot be opened"):
        tawny.export(changed, tmp_path / "m.gguf", template=path)


def test_a_gguf_source_fits_itself(words, tmp_path):  # noqa: F811
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    path = tmp_path / "whole.gguf"
    tawny.export(folder, path, type="F16", tokenizer_from=words)
    tawny.prune(path, tmp_path / "pruned", sparsity=0.5, allocator="uniform", solver="magnitude")
    report = tawny.export(tmp_path / "pruned", tmp_path / "m.gguf", template=path)
    known = tawny.export(tmp_path / "pruned", tmp_path / "known.gguf", type="F16")
    assert report.types == known.types
    ours, theirs = contents(tmp_path / "m.gguf"), contents(tmp_path / "known.gguf")
    assert all(
        torch.equal(ours[name], theirs[name])
        for name in theirs
        if name.startswith("blk.") and theirs[name].dim() > 1
    )
