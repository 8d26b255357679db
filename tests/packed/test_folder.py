from __future__ import annotations

import json
import re
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import tawny
from tawny.decoding.opening import threads
from tawny.errors import CheckpointError, MissingFeature, ModelError, OutputError, UserError
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.packed.folder import PackedFolder
from tests.packed.cases import python
from tests.packed.test_live import logits, pruned
from tests.tiny import tokens


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    pruned(family, **changes).to(dtype).save_pretrained(folder)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def packed_llama(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("llama")
    tawny.pack(saved(base / "dense", dtype=torch.bfloat16), base / "packed", "bf16")
    return base / "packed"


def test_a_pickle_beside_other_files_is_not_opened(tmp_path):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ModelError, match=r"names 'adapter_model\.bin' as its weights"):
        tawny.load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").rename(folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        tawny.load(folder)


def test_two_loads_of_one_type_are_told_apart_from_a_cast(packed_llama):
    assert tawny.load(packed_llama).dtype is torch.bfloat16
    model = tawny.load(packed_llama, dtype="float32")
    assert model.dtype is torch.float32
    assert model.model.layers[0].mlp.up_proj.values.dtype is torch.bfloat16
    assert logits(model, tokens(1, 4)).dtype is torch.float32


def test_hashes_are_compared_on_all_threads(packed_llama, monkeypatch):
    folder, meeting = PackedFolder(packed_llama), threading.Barrier(2, timeout=30)
    first = sorted(folder.tensors, key=lambda name: folder.tensors[name].offset)[:2]
    compare = PackedFolder._verify

    def compare_together(self, name):
        if name in first:
            meeting.wait()  # one thread would wait for the second tensor in vain
        compare(self, name)

    monkeypatch.setattr(PackedFolder, "_verify", compare_together)
    with threads(2):
        folder.verify()


@pytest.mark.parametrize("device", ["cuda:99", "xyz"])
def test_a_device_this_machine_lacks_is_refused_in_one_line(device, packed_llama):
    for use in (tawny.load, lambda folder, device: tawny.evaluate(folder, tokens(1, 4), device=device)):
        with pytest.raises(MissingFeature, match=rf"device '{device}' cannot be used \(.*\): `tawny doctor`"):
            use(packed_llama, device=device)


ORDERS = {
    "tawny first": "import tawny; from transformers import AutoModelForCausalLM as A",
    "tawny last": "from transformers import AutoModelForCausalLM as A; import transformers.modeling_utils; import tawny",
    "lazily between": "import transformers; import tawny; A = transformers.AutoModelForCausalLM",
    "our module first": "import tawny.packed.quantizer; from transformers import AutoModelForCausalLM as A",
}


@pytest.mark.parametrize(
    "order",
    [*list(ORDERS)[:2], *(pytest.param(order, marks=pytest.mark.slow) for order in list(ORDERS)[2:])],
)
def test_plain_transformers_opens_a_packed_folder_once_tawny_is_imported(order, packed_llama):
    code = "import sys; {}; print(type(A.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj))"
    done = python(code.format(ORDERS[order]), packed_llama)
    assert "PackedLinear" in done.stdout, done.stderr


def test_another_class_than_the_folder_holds_is_told_what_opens_it(packed_llama, tmp_path):
    for other, name, more in (
        (AutoModel, "LlamaModel", "; its base model is `.model`"),
        (AutoModelForSequenceClassification, "LlamaForSequenceClassification", ""),
    ):
        words = f"{packed_llama} holds a LlamaForCausalLM, not a {name}: open it with AutoModelForCausalLM or tawny.load{more}"
        with pytest.raises(CheckpointError, match=f"^{re.escape(words)}$"):
            other.from_pretrained(packed_llama)
    damaged = copy(packed_llama, tmp_path / "damaged")
    edit_config(damaged, lambda config: config.update(num_hidden_layers=4))
    # The class is right, and so the folder is damaged.
    with pytest.raises(CheckpointError, match=r"lacks .* weights of the model"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_load_may_be_the_first_thing_a_process_does(packed_llama, tmp_path):
    """Importing transformers' registry registers us, and that import may be our own."""
    for folder, expected in {packed_llama: "PackedLinear", saved(tmp_path): "Linear"}.items():
        code = "import sys, tawny; print(type(tawny.load(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
        done = python(code, folder)
        assert done.stdout.strip() == expected, done.stderr


def test_transformers_without_tawny_fails_loudly(packed_llama):
    done = python(
        "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])",
        packed_llama,
    )
    assert done.returncode and "no file named model.safetensors" in done.stderr


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_index(folder: Path, change, name: str = INDEX) -> None:
    path = folder / name
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def edit_config(folder: Path, change) -> None:
    edit_index(folder, change, "config.json")


@pytest.mark.parametrize("part", ["masks", "values", "offsets"])
def test_a_flipped_bit_is_refused_by_name(part, packed_llama, tmp_path):
    folder = copy(packed_llama, tmp_path / "x")
    name = f"model.layers.1.mlp.up_proj.{part}"
    entry = PackedFolder(folder).tensors[name]
    path = folder / entry.shard
    data = bytearray(path.read_bytes())
    data[entry.offset + 9] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}.*SHA-256"):
        tawny.load(folder)
    with pytest.raises(CheckpointError, match=name):
        tawny.evaluate(folder, tokens(2, 16))
    with pytest.raises(CheckpointError, match=name):
        tawny.unpack(folder, tmp_path / "y")
    if part == "values":
        tawny.load(folder, verify=False)  # nothing but the hash knows
    else:
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj"):
            tawny.load(folder, verify=False)


def test_a_truncated_shard_is_refused_by_name(packed_llama, tmp_path):
    folder = copy(packed_llama, tmp_path / "x")
    path = next(folder.glob("packed-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tensor '.*' *: .* bytes where"):
        tawny.load(folder, verify=False)
    path.rename(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"packed-00001"):
        tawny.load(folder)


def put(value, *path):
    """A damage: another value somewhere in the index."""

    def damage(index):
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = value(index[path[-1]]) if callable(value) else value

    return damage


def lose(*path):
    def damage(index):
        for key in path[:-1]:
            index = index[key]
        del index[path[-1]]

    return damage


FIRST = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "change",
    [
        put([1, 2, 4], "tensors", f"{FIRST}.masks", "shape"),
        put([32, 48], "linears", FIRST, "shape"),
        put(lambda offset: offset + 8, "tensors", f"{FIRST}.masks", "offset"),
        put(lambda nnz: nnz - 1, "linears", FIRST, "nnz"),
        lose("tensors", f"{FIRST}.masks"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused_by_name(change, packed_llama, tmp_path):
    folder = copy(packed_llama, tmp_path / "x")
    edit_index(folder, change)
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
            tawny.load(folder, verify=verify)


def test_an_index_with_nonsense_is_refused(packed_llama, tmp_path):
    folder = copy(packed_llama, tmp_path / "x")
    edit_index(folder, lambda index: index.pop("dense"))
    with pytest.raises(CheckpointError, match="dense"):
        PackedFolder(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="index"):
        PackedFolder(folder)


@pytest.mark.parametrize("version", [3, 5])
def test_another_version_is_refused(packed_llama, tmp_path, version):
    folder = copy(packed_llama, tmp_path / "x")
    edit_index(folder, lambda index: index["metadata"].update(version=version))
    with pytest.raises(CheckpointError, match=f"version {version}, this Tawny reads version 4"):
        tawny.load(folder)
    folder = copy(packed_llama, tmp_path / "y")
    edit_config(folder, put(version, "quantization_config", "version"))
    with pytest.raises(CheckpointError, match=f"version {version}"):
        tawny.load(folder)


def test_what_goes_wrong_is_said_before_work(tmp_path, packed_llama):
    dense = saved(tmp_path / "dense")
    with pytest.raises(UserError, match="int7"):
        tawny.pack(dense, tmp_path / "x", "int7")
    with pytest.raises(CheckpointError, match="packed already"):
        tawny.pack(packed_llama, tmp_path / "x", "bf16")
    with pytest.raises(ModelError, match="unpack"):
        tawny.prune(packed_llama, tmp_path / "x", sparsity=0.8, solver="magnitude", allocator="uniform")
    with pytest.raises(CheckpointError, match="not a packed folder"):
        tawny.unpack(dense, tmp_path / "x")
    with pytest.raises(OutputError, match="itself"):
        tawny.pack(dense, dense, "bf16", overwrite=True)
    tawny.pack(dense, tmp_path / "x", "bf16")
    with pytest.raises(OutputError, match="exists"):
        tawny.pack(dense, tmp_path / "x", "bf16")
    tawny.pack(dense, tmp_path / "x", "int8", overwrite=True)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]["values"] == "int8"
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "x" / "blocks").exists()


def test_a_folder_quantised_by_something_else_is_refused(tmp_path):
    dense = saved(tmp_path / "dense")
    edit_config(dense, put({"quant_method": "aqlm"}, "quantization_config"))
    with pytest.raises(ModelError, match="aqlm"):
        tawny.pack(dense, tmp_path / "x", "bf16")


def test_a_header_longer_than_its_file_is_refused(packed_llama, tmp_path):
    folder = copy(packed_llama, tmp_path / "x")
    path = next(folder.glob("packed-*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
    with pytest.raises(CheckpointError, match="packed-00001"):
        tawny.load(folder)


def without(folder: Path, *names: str) -> Path:
    """The folder, its one safetensors file written again without some tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in names:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "family,name",
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("qwen2", "model.embed_tokens.weight"),
        ("phi", "model.layers.2.mlp.fc1.bias"),
        ("gpt2", "transformer.h.1.ln_1.weight"),
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_name(family, name, tmp_path):
    with pytest.raises(CheckpointError, match=rf"lacks \d weights of the model, first .*'{name}'.*fetch"):
        tawny.load(without(saved(tmp_path / "x", family), name))


def test_a_head_stored_apart_from_the_embedding_it_is_tied_to_packs_and_loads(tmp_path):
    dense = saved(tmp_path / "dense", "qwen2")
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    tawny.pack(dense, tmp_path / "packed", "f32", head="f32")
    model = tawny.load(tmp_path / "packed")
    assert torch.equal(model.lm_head.dense(), tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens(torch.arange(256)), tensors["model.embed_tokens.weight"])


@pytest.fixture(scope="module")
def packed_tied(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("qwen2")
    tawny.pack(saved(base / "dense", "qwen2"), base / "packed", "f32", head="f32")
    return base / "packed"


UP = "model.layers.1.mlp.up_proj"


def in_header(change):
    """A damage of the header of the dense checkpoint's first file."""

    def damage(index):
        header = json.loads(index["source"][0]["header"])
        change(header)
        index["source"][0]["header"] = json.dumps(header)

    return damage


def moved(by):
    def last_moved(header):
        entry = max((h for h in header.values() if "shape" in h), key=lambda h: h["data_offsets"])
        entry["data_offsets"] = [place + by for place in entry["data_offsets"]]

    return in_header(last_moved)


def edited(change):
    """A damage of that header's text."""
    return lambda index: index["source"][0].update(header=change(index["source"][0]["header"]))


# What transformers stumbles over itself, before it asks us.
OF_TRANSFORMERS = [
    *(put(value, "weight_map", f"{UP}.masks") for value in (None, 5, [])),
    *(put(value, key) for key in ("weight_map", "metadata") for value in (None, 5, [])),
]
FILES = ("config.json", "a\0.safetensors", "\ud800.safetensors", "../model.safetensors")
DAMAGES = [
    *OF_TRANSFORMERS,
    *(moved(by) for by in (-64, 10**9, 2**63)),
    *(put(name, "source", 0, "file") for name in FILES),
    lambda index: index["source"].append({"file": index["source"][0]["file"], "header": "{}"}),
    edited(lambda header: header.rstrip()[:-1] + ',"__metadata__":{}}'),
    edited(lambda header: header[:50]),
    edited(lambda header: "[" * 200_000),
    put(json.dumps({"weight_map": {"a": "b.safetensors"}}), "source_index"),
    put([], "source_index"),
    put(8, "shards", "packed-00009-of-00009.safetensors"),
    put("model.safetensors", "source"),
    lose("source", 0, "file"),
    lose("source", 0, "header"),
    in_header(lambda header: header.pop(f"{UP}.weight")),
    in_header(lambda header: header[f"{UP}.weight"].update(shape=[1, 2])),
    lose("tensors", f"{UP}.masks", "sha256"),
    put("0", "tensors", f"{UP}.masks", "offset"),
    put("F7", "linears", UP, "storage"),
    put(["F32"], "linears", UP, "storage"),
    put(["model.layers.0.mlp.up_proj.weight"], "linears", UP, "sources"),
    lose("linears", UP),
    lose("weight_map", f"{UP}.masks"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused_in_one_line_by_all_who_read_it(damage, packed_tied, tmp_path):
    folder = copy(packed_tied, tmp_path / "x")
    edit_index(folder, damage)
    readers = [
        lambda: tawny.load(folder, verify=False),
        lambda: tawny.unpack(folder, tmp_path / "y"),
        lambda: tawny.inspect(folder),
    ]
    if damage not in OF_TRANSFORMERS:
        readers.append(lambda: AutoModelForCausalLM.from_pretrained(folder))
    for read in readers:
        with pytest.raises(CheckpointError) as caught:
            read()
        assert "pack" in str(caught.value) and "\n" not in str(caught.value)


def renamed(old, new):
    """Every weight of the index whose name begins with `old`, under a name that begins with `new`."""

    def damage(index):
        for table in (index["linears"], index["tensors"], index["weight_map"]):
            for name in [name for name in table if name.startswith(old)]:
                table[name.replace(old, new)] = table.pop(name)

    return damage


@pytest.mark.parametrize(
    "damage,named",
    [
        (lambda index: index["dense"].append("model.layers.7.mlp.up_proj"), "model.layers.7.mlp.up_proj"),
        (put(None, "linears", "lm_head", "embedding"), "lm_head"),
        (put("model.norms", "linears", "lm_head", "embedding"), "model.norms"),
        (renamed(UP, UP + "x"), UP + "x"),
    ],
)
def test_an_index_of_another_model_is_refused_by_name(damage, named, packed_tied, tmp_path):
    folder = copy(packed_tied, tmp_path / "x")
    edit_index(folder, damage)
    for load in (tawny.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=named):
            load(folder)


def test_a_shard_without_tensors_is_refused_whether_it_is_there_or_not(packed_tied, tmp_path):
    folder = copy(packed_tied, tmp_path / "x")
    edit_index(folder, put(8, "shards", "packed-00009-of-00009.safetensors"))
    with pytest.raises(CheckpointError, match="no tensor of the index lies in its shard packed-00009"):
        PackedFolder(folder)
    (folder / "packed-00009-of-00009.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="packed-00009"):
        PackedFolder(folder)


@pytest.mark.parametrize("name", [INDEX, "packed-00001-of-00001.safetensors"])
def test_json_that_is_nested_without_end_is_refused(name, packed_tied, tmp_path):
    folder = copy(packed_tied, tmp_path / "x")
    deep = b"[" * 200_000
    whole = (folder / name).read_bytes()
    if name == INDEX:
        (folder / name).write_bytes(deep)
    else:
        (folder / name).write_bytes(struct.pack("<Q", len(deep)) + deep + whole[8:])
        edit_index(folder, lambda index: index["shards"].update({name: (folder / name).stat().st_size}))
    for read in (tawny.load, tawny.inspect, lambda source: tawny.unpack(source, tmp_path / "y")):
        with pytest.raises(CheckpointError, match="recursion"):
            read(folder)


@pytest.mark.parametrize("text", ["null", "5"])
def test_a_configuration_that_is_none_is_refused(text, tmp_path):
    dense = saved(tmp_path / "dense")
    (dense / "config.json").write_text(text)
    for read in (tawny.load, tawny.inspect, lambda source: tawny.pack(source, tmp_path / "y")):
        with pytest.raises(ModelError):
            read(dense)


def test_a_setting_called_like_a_method_does_no_harm(packed_llama, tmp_path):
    folder = copy(packed_llama, tmp_path / "x")
    edit_config(folder, put(3, "quantization_config", "to_dict"))
    assert tawny.load(folder).config.quantization_config.values == "bf16"


def test_a_changed_configuration_is_said_once_and_an_old_index_says_nothing(packed_llama, tmp_path, caplog):
    tawny.load(packed_llama)
    assert not caplog.records
    folder = copy(packed_llama, tmp_path / "x")
    edit_config(folder, put(0.1, "rms_norm_eps"))
    tawny.load(folder)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "config.json is not the one that was packed" in said and "\n" not in said
    caplog.clear()
    old = copy(folder, tmp_path / "y")
    edit_index(old, lambda index: index.pop("config_sha256"))
    tawny.load(old)
    assert not caplog.records


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**9}, {"rope_parameters": 3}],
)
def test_a_damaged_configuration_is_one_line_for_all_who_open_the_folder(
    change, packed, packed_llama, tmp_path
):
    folder = copy(packed_llama, tmp_path / "x") if packed else saved(tmp_path / "x")
    edit_config(folder, lambda config: config.update(change))
    readers = [tawny.load, tawny.inspect, lambda source: tawny.evaluate(source, tokens(1, 4))]
    readers.append(lambda source: tawny.generate(source, tokens(1, 4)))
    if not packed:
        readers.append(lambda source: tawny.prune(source, tmp_path / "out", sparsity=0.5, solver="magnitude"))
    for read in readers:
        with pytest.raises((ModelError, CheckpointError)) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
