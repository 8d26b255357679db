from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.decoding.text import end_tokens
from tawny.errors import CheckpointError, ModelError
from tawny.model import gguf_header
from tawny.model.checkpoint import Checkpoint, file_bytes
from tawny.model.gguf_conversion import convert_gguf, gguf_form
from tawny.model.shards import ShardWriter
from tawny.model.source import load_tokenizer
from tests.tiny import tiny_model

HIDDEN, INNER, WORDS, BLOCKS = 64, 96, 300, 2


def write(
    path: Path,
    zeros=slice(0),
    without="",
    misspelt="",
    parts=1,
    rope: Mapping[str, str | float | int] = MappingProxyType({}),
    more: Mapping[str, np.ndarray] = MappingProxyType({}),
    inner: int = INNER,
    experts: int = 0,
    turn: int | None = None,
    kinds: Sequence[gguf.GGMLQuantizationType] = (),
    order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A tiny LLaMA, or Qwen3 with experts; `zeros` are columns of the last down projection that are pruned.

    With `kinds`, each block's down projection has another type. `rope` are keys of rotary positions, `more` tensors.
    """
    blocks = len(kinds) or BLOCKS
    writer = gguf.GGUFWriter(str(path), "qwen3moe" if experts else "llama", endianess=order)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(HIDDEN // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*pieces, *(f"▁w{i}" for i in range(WORDS - len(pieces)))])
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (WORDS - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if turn is not None:
        writer.add_eot_token_id(turn)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(inner)
        writer.add_key_length(HIDDEN // 4)
        writer.add_value_length(HIDDEN // 4)
    for key, value in rope.items():
        adders = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        adders[type(value)](f"llama.rope.{key}", value)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    generator = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = generator.standard_normal(shape, dtype=np.float32) if len(shape) > 1 else np.ones(shape)
        if name == f"blk.{blocks - 1}.ffn_down.weight":
            values[:, zeros] = 0
        if kinds and "ffn_down" in name:
            kind = kinds[int(name.split(".")[1])]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = generator.integers(0, 60, (shape[0], shape[1] // block * size), dtype=np.uint8)
            writer.add_tensor(name, data, raw_dtype=kind)
        elif name != without:
            writer.add_tensor("x" + name if name == misspelt else name, values.astype(np.float32))

    add("token_embd.weight", WORDS, HIDDEN)
    add("output.weight", WORDS, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for block in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}.weight", HIDDEN, HIDDEN)
        each, of = ("_exps", (experts,)) if experts else ("", ())
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{block}.{name}{each}.weight", *of, inner, HIDDEN)
        add(f"blk.{block}.ffn_down{each}.weight", *of, HIDDEN, inner)
        if experts:
            add(f"blk.{block}.ffn_gate_inp.weight", experts, HIDDEN)
            for name in ("attn_q_norm", "attn_k_norm"):
                add(f"blk.{block}.{name}.weight", HIDDEN // 4)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{block}.{name}.weight", HIDDEN)
    for name, values in more.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TAWNY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def last_down(folder: Path) -> torch.Tensor:
    name = f"model.layers.{BLOCKS - 1}.mlp.down_proj.weight"
    return Checkpoint(folder).read([name])[name]


def test_a_gguf_file_is_converted_once_and_loads(tmp_path):
    said: list[str] = []
    path = write(tmp_path / "m.gguf")
    folder = convert_gguf(path, said.append)
    assert convert_gguf(path, said.append) == folder and len(said) == 1
    assert len(tawny.load(path).model.layers) == BLOCKS


def test_every_type_that_gguf_dequantises_is_read(tmp_path):
    kinds = [kind for kind in gguf.GGMLQuantizationType if can_be_dequantised(kind)]
    assert len(kinds) > 20
    path = write(tmp_path / "m.gguf", inner=256, kinds=kinds)
    checkpoint = Checkpoint(convert_gguf(path))
    told = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    for block, kind in enumerate(kinds):
        stored = told[f"blk.{block}.ffn_down.weight"]
        expected = torch.from_numpy(gguf.dequantize(stored.data, kind)).bfloat16()
        name = f"model.layers.{block}.mlp.down_proj.weight"
        assert stored.tensor_type == kind
        torch.testing.assert_close(checkpoint.read([name])[name], expected, rtol=0, atol=0, equal_nan=True)


def can_be_dequantised(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return kind.name not in ("F32", "F16", "BF16")  # which have no blocks; the other tests read them


@pytest.mark.parametrize("where", ["one path", "two paths", "two paths of one time", "one path of one time"])
def test_two_models_that_differ_only_in_what_was_pruned_are_told_apart(where, tmp_path):
    sizes, made = [], []
    for folder, zeros in (("a", slice(0, 32)), ("a" if where.startswith("one") else "b", slice(32, 64))):
        (tmp_path / folder).mkdir(exist_ok=True)
        # Large enough that the weights that differ lie far behind the head of the file.
        path = write(tmp_path / folder / "m.gguf", zeros=zeros, inner=4096)
        if "of one time" in where:
            os.utime(path, ns=(0, 0))
        sizes.append(path.stat().st_size)
        made.append(convert_gguf(path))
    (before, after), (first, second) = made, map(last_down, made)
    assert sizes[0] == sizes[1] and before != after
    assert not first[:, :32].any() and first[:, 32:].all()
    assert not second[:, 32:64].any() and second[:, :32].all()


@pytest.mark.parametrize(
    "damage,name,said",
    [
        ("without", "blk.1.ffn_up.weight", r"lacks 1 weights.*'model\.layers\.1\.mlp\.up_proj\.weight'"),
        ("without", "output_norm.weight", r"lacks 1 weights.*'model\.norm\.weight'"),
        ("misspelt", "blk.1.ffn_up.weight", r"LlamaForCausalLM has no place for .*'xblk\.1\.ffn_up\.weight'"),
        ("misspelt", "output_norm.weight", r"LlamaForCausalLM has no place for .*'xoutput_norm\.weight'"),
    ],
)
def test_a_file_that_lacks_a_weight_or_holds_another_is_refused_and_never_cached(
    damage, name, said, tmp_path, cache
):
    path = write(tmp_path / "m.gguf", **{damage: name})
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"m\.gguf cannot be converted.*{said}") as caught:
            convert_gguf(path)
        assert "\n" not in str(caught.value)
    assert not list(cache.glob("*"))


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_a_bias_that_the_model_has_no_place_for_is_never_dropped(part, tmp_path, cache):
    path = write(tmp_path / "m.gguf", more={f"blk.1.ffn_{part}.bias": np.ones(8)})
    with pytest.raises(CheckpointError, match=rf"has no place for .*'blk\.1\.ffn_{part}\.bias'"):
        convert_gguf(path)
    assert not list(cache.glob("*"))


def test_biases_of_the_feed_forward_are_read(tmp_path):
    sizes = {"gate": INNER, "up": INNER, "down": HIDDEN}
    biases = {
        f"blk.{block}.ffn_{part}.bias": np.arange(size) + 100 * block
        for block in range(BLOCKS)
        for part, size in sizes.items()
    }
    model = tawny.load(write(tmp_path / "m.gguf", more=biases), dtype=torch.float32)
    assert model.config.mlp_bias and not model.config.attention_bias
    for block, layer in enumerate(model.model.layers):
        for part in sizes:
            found = getattr(layer.mlp, f"{part}_proj").bias.numpy()
            assert (found == biases[f"blk.{block}.ffn_{part}.bias"]).all()


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "told,expected",
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, LINEAR),
        ({"scaling.factor": 4.0}, LINEAR),  # llama.cpp takes it so
        ({"scale_linear": 4.0}, LINEAR),  # as files of 2023 say it
        ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
        ({"scaling.type": "linear"}, {"rope_type": "default"}),
        ({"scaling.factor": 0.0, "scaling.original_context_length": 32}, {"rope_type": "default"}),
    ],
)
def test_linear_scaling_of_rotary_positions_is_read(told, expected, tmp_path):
    model = tawny.load(write(tmp_path / "m.gguf", rope=told))
    assert model.config.rope_parameters == {"rope_theta": 10000.0, **expected}
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / expected.get("factor", 1.0))


@pytest.mark.parametrize(
    "told,more,said",
    [
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32},
            {},
            r"llama\.rope\.scaling\.type 'yarn', llama\.rope\.scaling\.factor 4\.0, .*original_context_length 32\)",
        ),
        ({"scaling.type": "longrope"}, {}, "'longrope'"),
        (
            {"scaling.type": "linear", "scaling.factor": 4.0},
            {"rope_freqs.weight": np.full(HIDDEN // 8, 8.0)},
            "factor 4",
        ),
    ],
)
def test_other_scaling_of_rotary_positions_is_refused_before_the_weights_are_converted(
    told, more, said, tmp_path, cache, monkeypatch
):
    path = write(tmp_path / "m.gguf", rope=told, more=more)
    monkeypatch.setattr(
        "tawny.model.shards.ShardWriter.add", lambda *_: pytest.fail("a tensor was converted")
    )
    with pytest.raises(
        CheckpointError, match=rf"m\.gguf scales .*{said}.*; expected the type none"
    ) as caught:
        convert_gguf(path)
    assert "\n" not in str(caught.value) and not list(cache.glob("*"))


def test_a_conversion_is_on_the_disk_before_it_has_its_name(tmp_path, cache, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "tawny.model.gguf_conversion.durable.sync", lambda path: synced.append((path.name, path.exists()))
    )
    made = convert_gguf(write(tmp_path / "m.gguf"))
    assert {path.name for path in made.iterdir()} <= {name for name, _ in synced}
    assert all(there for _, there in synced) and synced[-1][0].startswith(f"{made.name}.partial")


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path, cache):
    path = write(tmp_path / "m[1].gguf")
    made = convert_gguf(path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    whose = [f"{host}-{ended.pid}", f"{host}-{os.getppid()}", f"other-{ended.pid}", f"{host}-2-{ended.pid}"]
    gone, *others = (made.with_name(f"{made.name}.partial-{each}") for each in whose)
    for folder in (gone, *others):
        made.rename(folder)
        assert convert_gguf(path) == made
    assert not gone.exists() and all(folder.is_dir() for folder in others)


@pytest.mark.parametrize(("turn", "ends"), [(None, 2), (2, 2), (7, [2, 7])])
def test_the_end_of_a_turn_ends_a_text_too(tmp_path, cache, turn, ends):
    model = tawny.load(write(tmp_path / "m.gguf", turn=turn))
    assert model.config.eos_token_id == ends
    assert end_tokens(model, None) == ({ends} if isinstance(ends, int) else set(ends))


def test_experts_that_lack_a_half_of_their_gated_weights_are_refused(tmp_path, cache):
    sizes = {"experts": 4, "inner": 768}  # the width transformers takes any such file to have
    model = tawny.load(write(tmp_path / "whole.gguf", **sizes))
    assert model.config.num_experts == 4
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="whole.gguf", dtype=torch.bfloat16)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    path = write(tmp_path / "m.gguf", **sizes, without="blk.1.ffn_gate_exps.weight")
    with pytest.raises(CheckpointError, match=r"lacks 'blk\.1\.ffn_gate_exps\.weight'"):
        convert_gguf(path)
    assert [made.name[:5] for made in cache.glob("*")] == ["whole"]


def test_experts_are_written_as_soon_as_they_are_complete(tmp_path, cache, monkeypatch):
    added, add = [], ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", lambda self, some: added.append(list(some)) or add(self, some))
    convert_gguf(write(tmp_path / "m.gguf", experts=4, inner=768))
    assert all(len(some) == 1 for some in added)
    (fused,) = [some for (some,) in added if "layers.0" in some and "gate_up_proj" in some]
    later = [some for (some,) in added if "layers.1" in some]
    assert added.index([fused]) < min(added.index([some]) for some in later)


def test_a_part_of_a_split_file_is_refused_in_one_line(tmp_path, cache):
    first = write(tmp_path / "m-00001-of-00002.gguf")
    refusal = r"one of 2 parts of a split model; .*merge the parts"
    with pytest.raises(CheckpointError, match=refusal) as caught:
        convert_gguf(first)
    assert "\n" not in str(caught.value)
    renamed = write(tmp_path / "renamed.gguf", parts=2)
    with pytest.raises(CheckpointError, match=refusal):
        convert_gguf(renamed)
    assert not cache.is_dir() or not list(cache.glob("*"))


def test_a_whole_file_that_was_split_into_one_part_is_no_part(tmp_path):
    shutil.move(write(tmp_path / "m.gguf"), tmp_path / "m-00001-of-00001.gguf")
    assert re.match("m-00001-of-00001-", convert_gguf(tmp_path / "m-00001-of-00001.gguf").name)


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
@pytest.mark.parametrize(
    ("at", "kind", "said"),
    [
        (8, "Q", "tensors"),
        ("count", "Q", "items"),
        ("key", "Q", "characters"),
        (16, "Q", "numbers|characters|items|type"),
    ],
)
def test_a_header_that_asks_for_more_than_the_file_holds_is_refused_in_one_line(
    at, kind, said, order, tmp_path, cache
):
    """`gguf` would make an object for each of 2⁶² items."""
    path = write(tmp_path / "m.gguf", order=order)
    data, key = bytearray(path.read_bytes()), b"tokenizer.ggml.scores"
    places = {"key": data.index(key) - 8, "count": data.index(key) + len(key) + 8}
    struct.pack_into((">" if order else "<") + kind, data, places.get(at, at), 1 << 62)
    path.write_bytes(data)
    for read in (convert_gguf, gguf_form):
        with pytest.raises(CheckpointError, match=rf"m\.gguf cannot be opened .*({said})") as caught:
            read(path)
        assert "\n" not in str(caught.value) and not list(cache.glob("*"))


def test_inspect_tells_the_file_and_not_its_converted_copy(tmp_path):
    kinds = [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q6_K]
    path = write(tmp_path / "m.gguf", inner=256, kinds=kinds)
    told = tawny.inspect(path)
    assert told.bytes == path.stat().st_size != file_bytes(convert_gguf(path))
    assert told.stored == "GGUF F32 81 %, Q8_0 10 %, Q6_K 10 %, opened as bfloat16"


def test_what_is_no_gguf_file_is_said_to_be_none(tmp_path):
    (tmp_path / "text.gguf").write_text("hi")
    with pytest.raises(CheckpointError, match="it does not begin with the letters GGUF"):
        gguf_header.open_gguf(tmp_path / "text.gguf")
    with pytest.raises(CheckpointError, match="it is a folder"):
        gguf_header.open_gguf(tmp_path)


def test_lists_longer_than_any_tokenizer_has_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_header, "_MOST_ITEMS", 3 * WORDS)
    assert gguf_form(path) == "GGUF F32, opened as bfloat16"
    monkeypatch.setattr(gguf_header, "_MOST_ITEMS", 3 * WORDS - 1)
    with pytest.raises(CheckpointError, match=f"its lists hold {3 * WORDS:,} items; expected at most"):
        gguf_form(path)


@pytest.mark.parametrize("key", [b"tokenizer.ggml.tokens", b"tokenizer.ggml.model"])
def test_a_tokenizer_that_cannot_be_read_is_refused_before_the_weights_are_converted(
    key, tmp_path, cache, monkeypatch
):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(key, key[:-1] + b"X"))
    monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("a tensor was converted"))
    with pytest.raises(CheckpointError, match=r"m\.gguf .*tokenizer") as caught:
        convert_gguf(path)
    assert "\n" not in str(caught.value) and not list(cache.glob("*"))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
def test_a_folder_without_tokenizer_files_says_so(family, tmp_path):
    """Of some families transformers makes a tokenizer without words then."""
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no usable tokenizer .*copy the tokenizer files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("given", [None, 3, "model"])
def test_what_is_no_name_of_a_model_is_refused_in_one_line(given, tmp_path):
    given = tiny_model("llama") if given == "model" else given
    for call in (tawny.load, tawny.inspect, lambda x: tawny.pack(x, tmp_path / "out")):
        with pytest.raises(ModelError, match=f"a {type(given).__name__} was given; expected a folder"):
            call(given)
