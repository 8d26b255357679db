from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tawny
from tawny.errors import CheckpointError, ModelError
from tawny.model.checkpoint import INDEX, Checkpoint, file_bytes, weight_paths
from tawny.packed.opening import open_stack
from tests.encoders import tiny_encoder
from tests.packed.test_live import pruned
from tests.tiny import FAMILIES, tiny_model, tokens


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ["model.safetensors"]}}',
        '{"weight_map": {"a": "x.safetensors", "b": null}}',
        '{"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "../private/x.safetensors"}}',
        '{"weight_map": {"a": "/private/x.safetensors"}}',
    ],
)
def test_an_index_that_is_none_is_refused_in_one_line(text, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="not a valid safetensors index"):
        Checkpoint(tmp_path)


def test_bytes_are_those_of_the_model_and_of_no_file_beside_it(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    one = (tmp_path / "one" / "model.safetensors").stat().st_size
    shards = set(json.loads((tmp_path / "many" / INDEX).read_text())["weight_map"].values())
    assert len(shards) > 2
    many = sum((tmp_path / "many" / name).stat().st_size for name in shards)
    for folder in ("one", "many"):
        shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / folder / "consolidated.safetensors")
    assert (file_bytes(tmp_path / "one"), file_bytes(tmp_path / "many")) == (one, many)


def test_bytes_of_a_packed_folder_are_those_of_its_shards(tmp_path):
    pruned("llama").save_pretrained(tmp_path / "dense")
    report = tawny.pack(tmp_path / "dense", tmp_path / "packed", "f32")
    before = file_bytes(tmp_path / "packed")
    assert before == sum(path.stat().st_size for path in (tmp_path / "packed").glob("packed-*.safetensors"))
    assert report.bytes < before < report.file_bytes
    shutil.copy(tmp_path / "dense" / "model.safetensors", tmp_path / "packed")
    assert file_bytes(tmp_path / "packed") == before


def test_a_lone_file_of_any_name_counts_where_nothing_says_otherwise(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert weight_paths(tmp_path) == [tmp_path / "weights.safetensors"]
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        file_bytes(tmp_path)


def test_one_file_counts_before_an_index_that_was_left_as_transformers_has_it(tmp_path):
    """`save_pretrained` over a sharded folder takes the shards away and leaves their index."""
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    new = tiny_model("llama", seed=1)
    new.save_pretrained(tmp_path)
    assert (tmp_path / INDEX).is_file()
    assert weight_paths(tmp_path) == [tmp_path / "model.safetensors"]
    with torch.no_grad():
        found, wanted = open_stack(tmp_path, torch.float32).whole()(tokens()).logits, new(tokens()).logits
    torch.testing.assert_close(found, wanted)


def test_two_that_the_configuration_ties_are_two_where_they_differ(tmp_path):
    """As transformers has it, which says so and ties only equal ones."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    rewrite(tmp_path, lambda found: found | {"lm_head.weight": model.lm_head.weight.detach()})
    with torch.no_grad():
        found, wanted = open_stack(tmp_path, torch.float32).whole()(tokens()).logits, model(tokens()).logits
    torch.testing.assert_close(found, wanted)
    loss = tawny.evaluate(tmp_path, tokens(), compute="float32").loss
    assert loss == pytest.approx(tawny.evaluate(model, tokens()).loss)
    assert not tawny.inspect(tmp_path).tied_head
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert tawny.inspect(tmp_path / "tied").tied_head
    tiny_encoder("bert").save_pretrained(tmp_path / "headless")
    assert not tawny.inspect(tmp_path / "headless").tied_head


@pytest.mark.parametrize(
    "dtype,name", [(torch.uint16, "U16"), (torch.uint32, "U32"), (torch.complex64, "C64")]
)
def test_a_dtype_that_is_not_supported_is_called_that(dtype, name, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(4, dtype=dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'extra' in .* is stored as {name}, which is not supported"):
        Checkpoint(tmp_path / "dense").read(["extra"])
    with pytest.raises(CheckpointError, match=f"{name}, which is not supported"):
        tawny.pack(tmp_path / "dense", tmp_path / "packed", "f32")
    assert not list(tmp_path.glob("packed*"))


def rewrite(folder, change):
    """Change the tensors of the one file in `folder`, given and returned by name."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without(*words):
    return lambda found: {key: value for key, value in found.items() if not all(w in key for w in words)}


def shortened(*words):
    return lambda found: {
        key: value[:-1].contiguous() if all(w in key for w in words) else value
        for key, value in found.items()
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_that_is_missing_or_misshapen_is_named_before_the_work(family, tmp_path):
    names = ("w1", "w2", "w3") if family == "mixtral" else ("gate_proj", "down_proj", "up_proj")
    tiny_model(family).save_pretrained(tmp_path / "whole")
    for number, name in ((3, names[0]), (0, names[1]), (2, names[1]), (3, names[1]), (1, names[2])):
        words = ("layers.2.", f"experts.{number}.{name}.")
        for change, said in ((without, "lacks"), (shortened, "has shape")):
            folder = tmp_path / f"{number}{name}{change.__name__}"
            shutil.copytree(tmp_path / "whole", folder)
            rewrite(folder, change(*words))
            with pytest.raises(CheckpointError, match=said) as caught:
                open_stack(folder, torch.float32)
            assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [shortened("layers.1.", "w2"), without("layers.1.", "w3"), without("layers.1.", "w1")]
)
def test_experts_that_are_all_wrong_are_refused_with_the_shape_they_should_form(change, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    said = r"'model\.layers\.1\.mlp\.experts\..* do not form the shape \[4, "
    with pytest.raises(CheckpointError, match=said):
        open_stack(tmp_path, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_has_the_shapes_of_the_model(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    assert open_stack(tmp_path, torch.float32).checkpoint.units


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_act", "bogus", "KeyError: 'bogus'"),
        ("layer_types", ["full_attention"] * 5, "layer_types"),
        ("attn_implementation", "flash_attention_2", "[Ff]lash"),
        ("dtype", "float99", "float99"),
        ("num_hidden_layers", None, ""),
        ("hidden_size", "abc", "abc"),
        ("hidden_size", -4, ""),
        ("num_attention_heads", 0, ""),
        ("rope_parameters", {"rope_type": "bogus"}, "bogus"),
        ("quantization_config", "x", ""),
        ("model_type", "mymodel", "mymodel"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(key, value, said, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    keys = {"sparsity": 0.5, "allocator": "uniform", "solver": "magnitude"}
    for job in (lambda *where: tawny.prune(*where, **keys), tawny.pack):
        refusal = rf"config\.json cannot be used: .*{said}.*; correct it"
        with pytest.raises(ModelError, match=refusal) as caught:
            job(tmp_path / "model", tmp_path / "out")
        assert "\n" not in str(caught.value) and len(list(tmp_path.iterdir())) == 1


PRUNING = {"sparsity": 0.5, "allocator": "uniform", "solver": "wanda", "calibration": tokens()}


def test_masks_beside_the_weights_do_not_say_how_weights_are_stored(tmp_path):
    masks = {f"gpt_neox.layers.{i}.attention.bias": torch.ones(1, 1, 256, 256).byte() for i in range(3)}
    tiny_model("gpt_neox", dtype=torch.float16).save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", lambda found: {**found, **masks})
    assert tawny.prune(tmp_path / "model", tmp_path / "out", **PRUNING).storage == "float16"
    assert load_file(tmp_path / "out" / "model.safetensors").keys() >= masks.keys()


def test_linears_in_float8_are_still_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    rewrite(
        tmp_path / "model",
        lambda found: {k: v.to(torch.float8_e4m3fn) if "proj" in k else v for k, v in found.items()},
    )
    with pytest.raises(CheckpointError, match="stores its weights as F8_E4M3"):
        tawny.prune(tmp_path / "model", tmp_path / "out", **PRUNING)


TIED = ("model.embed_tokens", "lm_head")


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    for opens in (tawny.load, lambda folder: tawny.prune(folder, tmp_path / "out", **PRUNING)):
        with pytest.raises(ModelError, match=r"holds an adapter beside its weights .* merge it"):
            opens(tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_a_tied_weight_may_lie_under_the_name_of_the_head(tmp_path):
    tensors = {}
    for name in ("usual", "head"):
        tiny_model("qwen2").save_pretrained(tmp_path / name)
        if name == "head":
            rewrite(tmp_path / name, lambda found: {k.replace(*TIED): v for k, v in found.items()})
        tawny.prune(tmp_path / name, tmp_path / f"{name}-out", compute="float32", **PRUNING)
        tensors[name] = load_file(tmp_path / f"{name}-out" / "model.safetensors")
    tensors["usual"]["lm_head.weight"] = tensors["usual"].pop("model.embed_tokens.weight")
    assert tensors["usual"].keys() == tensors["head"].keys()
    assert all(torch.equal(value, tensors["head"][key]) for key, value in tensors["usual"].items())
    tawny.pack(tmp_path / "head-out", tmp_path / "packed", "f32", head="f32")
    losses = [tawny.evaluate(tmp_path / name, tokens()).loss for name in ("usual-out", "head-out", "packed")]
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(losses[2], rel=1e-3)


def dtypes(folder):
    return {key: value.dtype for key, value in load_file(folder / "model.safetensors").items()}


def test_float_buffers_are_computed_with_in_the_dtype_of_the_forwards(tmp_path):
    kinds = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    tiny_model("minimax", **kinds).save_pretrained(tmp_path / "model")
    tawny.prune(tmp_path / "model", tmp_path / "out", compute="bfloat16", **PRUNING)
    assert dtypes(tmp_path / "model") == dtypes(tmp_path / "out")


def test_every_expert_is_written_in_the_dtype_it_was_stored_in(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    rewrite(
        tmp_path / "model",
        lambda found: {k: v.half() if ".1." in k and "3.w2" in k else v for k, v in found.items()},
    )
    tawny.prune(tmp_path / "model", tmp_path / "out", **PRUNING)
    assert set(dtypes(tmp_path / "model").values()) == {torch.float32, torch.float16}
    assert dtypes(tmp_path / "model") == dtypes(tmp_path / "out")


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [2, -3]},
        {"shape": [3, 3]},
        {"shape": [2.0, 3]},
        {"dtype": "F64"},
        {"data_offsets": [0, 20]},
        {"data_offsets": [4, 28]},
        {"data_offsets": [0, 24, 24]},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(changed, tmp_path):
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changed
    header = json.dumps({"weight": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        Checkpoint(tmp_path)
