"""A GGUF file becomes a cached folder of safetensors, tensor by tensor, once.

transformers reads configuration, tokenizer and names; what it leaves out is read here, as llama.cpp reads it.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tawny.errors import CheckpointError
from tawny.machine import cache_folder
from tawny.model import durable
from tawny.model.gguf_header import open_gguf, refusing
from tawny.words import percent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

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


def gguf_form(path: Path) -> str:
    """How the weights of a GGUF file are stored, in words: each type of a hundredth of them or more."""
    sizes: Counter[str] = Counter()
    for tensor in open_gguf(path).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    shares = [(name, count / sizes.total()) for name, count in sizes.most_common()]
    told = [f"{name} {percent(share, 0)}" for name, share in shares if share >= 0.01]
    return f"GGUF {shares[0][0] if len(told) == 1 else ', '.join(told)}, opened as bfloat16"


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


@dataclass(frozen=True)
class _Described:
    """What the header of a file says of its model.

    Attributes:
        reader: of `gguf`.
        parsed: of transformers, without tensors.
        factors: what frequencies of rotary positions are divided by, where only a tensor tells; else None.
    """

    reader: Any
    config: PretrainedConfig
    parsed: dict[str, Any]
    architecture: str
    factors: Tensor | None


def _write_converted(path: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    described = _describe(path)
    with refusing(f"{path} holds a tokenizer that transformers cannot read"):  # before the long part
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    model = _model_of(path, described)
    _write_weights(path, folder, described, model)
    _check_whole(path, folder, model)
    # config.json comes last: it marks the cached folder as complete.
    _write_config(folder, described.config, type(model).__name__)


def _describe(path: Path) -> _Described:
    """What the header says.

    Raises:
        CheckpointError: the file is a part of a split model, or its header cannot be read.
    """
    from transformers import AutoConfig
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    reader = open_gguf(path)
    with refusing(f"{path} cannot be opened as a GGUF model"):
        if (split := reader.fields.get("split.count")) is not None and int(split.contents()) > 1:
            raise _split(path, int(split.contents()))
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        parsed = gguf_utils.load_gguf_checkpoint(str(path), return_tensors=False)
        architecture = str(reader.fields["general.architecture"].contents())
        factors = _read_from_tensors(config, {tensor.name: tensor for tensor in reader.tensors})
        _read_attention(config, reader.fields, architecture)
        _read_scaling(config, reader.fields, f"{architecture}.rope", path)
        _read_ends(config, reader.fields)
    return _Described(reader, config, parsed, architecture, factors)


def _model_of(path: Path, described: _Described) -> PreTrainedModel:
    """The model, without weights.

    Raises:
        CheckpointError: it cannot be built, or has other rotary positions than the file.
    """
    import torch

    from tawny.model.skeleton import build_skeleton, possible

    with refusing(f"{path} describes a model that cannot be built"):
        model = build_skeleton(possible(described.config), torch.bfloat16)
    if described.factors is not None and not _is_scaled_by(model, described.factors):
        raise CheckpointError(
            f"{path} scales its rotary positions in another way than Llama 3; give a safetensors folder"
        )
    return model


def _write_weights(path: Path, folder: Path, described: _Described, model: PreTrainedModel) -> None:
    """Dequantise the tensors one at a time, and write each parameter once it is whole.

    Raises:
        CheckpointError: a tensor cannot be converted, has no place in the model, or is missing.
    """
    import numpy as np
    import torch
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    from tawny.model.shards import ShardWriter

    parsed = described.parsed
    kind = gguf_utils.TENSOR_PROCESSORS.get(described.architecture, gguf_utils.TensorProcessor)
    processor = kind(config=parsed["config"])
    names = gguf_utils.get_gguf_hf_weights_map(model, processor)
    # Fused experts are collected by the processor, one parameter from several tensors.
    parsed["tensors"] = {}
    missing: dict[str, set[str]] = {}
    for tensor in described.reader.tensors:
        missing.setdefault(_target(names, tensor.name), set()).add(tensor.name)
    writer, fused = ShardWriter(folder, _SHARD), False
    for tensor in described.reader.tensors:
        with refusing(f"{path} cannot be converted: tensor {tensor.name!r}"):
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
    if fused:
        _check_halves(path, {tensor.name for tensor in described.reader.tensors})


def _check_halves(path: Path, held: set[str]) -> None:
    """Refuse experts of which one of two tensors is missing: each fills half of a parameter, whose other half would stay zero."""
    halves = {"ffn_gate_exps": "ffn_up_exps", "ffn_up_exps": "ffn_gate_exps"}
    for half, other in halves.items():
        absent = [n for name in sorted(held) if half in name and (n := name.replace(half, other)) not in held]
        if absent:
            raise CheckpointError(f"{path} cannot be converted: it lacks {absent[0]!r}; fetch the file again")


def _check_whole(path: Path, folder: Path, model: PreTrainedModel) -> None:
    """Refuse a file that lacks weights of its model."""
    from tawny.model.checkpoint import Checkpoint

    try:
        Checkpoint(folder).map_to(model)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be converted: {error}".replace(str(folder), "it")) from error


def _write_config(folder: Path, config: PretrainedConfig, architecture: str) -> None:
    import torch

    config.dtype = torch.bfloat16
    values = config.to_dict() | {"architectures": [architecture]}
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
        CheckpointError: it is not a linear scaling of plain positions.
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
