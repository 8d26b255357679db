"""`tawny export --to gguf`: a checkpoint as one GGUF file, a tensor at a time.

The types are those that keep zeros exactly and that the `gguf` package writes: F32, F16, BF16, and Q8_0, Q5_0, Q4_0, whose
blocks have a scale and no offset. llama.cpp stores and multiplies the zeros like any other number.
The finished file is opened again, and every tensor is compared with the checkpoint before the file has its name.
"""

from __future__ import annotations

__all__ = [
    "TYPES",
    "ExportReport",
    "Target",
    "check",
    "check_apart",
    "check_out",
    "export_gguf",
    "kind_for",
    "known_type",
    "stored",
]

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawny.errors import CheckpointError, ModelError, OutputError, UserError, nearest
from tawny.exporting.architectures import ARCHITECTURES, CONVERTER, Architecture, metadata, rope_factors
from tawny.exporting.tokenizer import Key, keys_of_folder, keys_of_gguf
from tawny.model import durable
from tawny.model.checkpoint import Checkpoint, Unit
from tawny.model.durable import writing
from tawny.model.source import gguf_behind, resolve
from tawny.packed.opening import open_checkpoint
from tawny.progress import Progress, silent
from tawny.run.place import same_place


@dataclass(frozen=True)
class Type:
    """A type of tensors in a GGUF file.

    Attributes:
        file_type: what `general.file_type` calls a file of them.
        dtype: of floats, which are rounded; None for integers with a scale for each block of 32.
        off: the largest error of an integer over the largest number of its block.
    """

    file_type: int
    dtype: torch.dtype | None = None
    off: float = 0.0


TYPES = {
    "F32": Type(0, torch.float32),
    "F16": Type(1, torch.float16),
    "BF16": Type(32, torch.bfloat16),
    "Q8_0": Type(7, off=1 / 254),
    "Q5_0": Type(8, off=1 / 16),
    "Q4_0": Type(2, off=1 / 8),
}
_ENDS = ("token_embd.weight", "output.weight")  # coarse types cost most here
_GROUP = 32
_ROWS = 4096  # converted at a time


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        types: how many tensors have each type.
        bytes, source_bytes: of the file, and of the tensors it was made from.
        zeros: exact zeros of the matrices, all kept.
    """

    source: str
    out: str
    to: str
    architecture: str
    tokenizer: str
    types: dict[str, int]
    tensors: int
    bytes: int
    source_bytes: int
    zeros: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """One tensor of the file: where its numbers come from and how they are stored."""

    name: str
    shape: tuple[int, ...]
    kind: str
    unit: Unit | None


class _Export:
    """A checkpoint seen as a GGUF model."""

    def __init__(self, folder: Path) -> None:
        from tawny.model.skeleton import open_skeleton

        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.model: Any = open_skeleton(folder, torch.float32)
        config = self.model.config
        if config.model_type not in ARCHITECTURES:
            raise ModelError(
                f"model type {config.model_type!r} is not exported to GGUF, only {', '.join(ARCHITECTURES)}; pass --template with "
                f"a GGUF file of the model, such as {CONVERTER} makes"
            )
        self.architecture: Architecture = ARCHITECTURES[config.model_type]
        self.header = metadata(config, self.architecture)
        frequencies = next(
            (b for n, b in self.model.named_buffers() if n.endswith("rotary_emb.inv_freq")), None
        )
        self.factors = rope_factors(config, self.architecture, frequencies)
        self.words = int(self.model.get_input_embeddings().weight.shape[0])
        self.checkpoint.map_to(self.model)

    def plan(self, kind: str | None) -> list[Target]:
        """Every tensor of the file, in its order; without a `kind` matrices keep the type they have."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        names = get_tensor_name_map(arch, int(self.header["block_count"]))
        stored = self.checkpoint.storage_dtype
        kind = kind or next((name for name, type in TYPES.items() if type.dtype == stored), "F32")
        parameters = dict(self.model.named_parameters())
        planned = []
        for unit in self.checkpoint.units:
            for target in unit.targets:
                if target not in parameters:
                    continue
                name = names.get_name(target, try_suffixes=(".weight", ".bias"))
                bias = target.endswith(".bias")
                if name is None or len(unit.targets) > 1 or (bias and not self.architecture.biases):
                    raise ModelError(
                        f"{target!r} has no place in the architecture {self.architecture.name!r} of llama.cpp; use {CONVERTER}"
                    )
                shape = tuple(parameters[target].shape)
                planned.append(Target(name, shape, kind_for(name, shape, kind), unit))
        if self.factors is not None:
            planned.append(Target("rope_freqs.weight", tuple(self.factors.shape), "F32", None))
        return planned

    def slabs(self, tensor: Target) -> Iterator[Tensor]:
        """The numbers of a tensor as llama.cpp wants them, float32, some rows at a time."""
        if tensor.unit is None:
            assert self.factors is not None
            yield self.factors
            return
        whole = next(iter(self.checkpoint.load(tensor.unit, self.model).values()))
        heads, key_heads = (int(self.header[f"attention.head_count{end}"]) for end in ("", "_kv"))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            whole = self.architecture.changed(tensor.name, whole, heads, key_heads)
        for start in range(0, len(whole), _ROWS):
            values = whole[start : start + _ROWS].float()
            if tensor.name.endswith("norm.weight"):
                values = self.architecture.changed(tensor.name, values, heads, key_heads)
            yield values


def kind_for(name: str, shape: tuple[int, ...], wanted: str) -> str:
    if len(shape) < 2:
        return "F32"
    if TYPES[wanted].dtype is not None:
        return wanted
    if shape[-1] % _GROUP:
        return "F16"
    return "Q8_0" if name in _ENDS else wanted


def stored(values: Tensor, tensor: Target) -> Any:
    """Numbers as the bytes of a GGUF file."""
    import gguf

    largest = float(values.abs().max())
    if not math.isfinite(largest):
        raise CheckpointError(f"{tensor.name!r} holds a number that is not finite; nothing is exported")
    if tensor.kind == "F16" and largest > torch.finfo(torch.float16).max:
        raise ModelError(
            f"{tensor.name!r} holds numbers too large for F16; give another --type, such as BF16"
        )
    return gguf.quantize(values.contiguous().numpy(), gguf.GGMLQuantizationType[tensor.kind])


def check(values: Tensor, data: Any, tensor: Target) -> int:
    """Compare what is in the file with what was meant; returns how many exact zeros were kept.

    Raises:
        CheckpointError: a zero is none any more, or a number is further off than its type allows.
    """
    import gguf

    stored = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.kind]).copy()).view_as(
        values
    )
    dtype, off = TYPES[tensor.kind].dtype, TYPES[tensor.kind].off
    if dtype is not None:
        fits = torch.equal(stored, values.to(dtype).float())
    else:
        groups = values.view(-1, _GROUP)
        largest = groups.abs().amax(1, keepdim=True)
        # The scale itself is rounded to float16: off by a share, or by 2⁻²⁵ where it is tiny, times a code of 1 / off at most.
        allowed = largest * (off + 2**-10) + 2**-25 / off
        fits = bool(((stored.view(-1, _GROUP) - groups).abs() <= allowed).all())
    zeros = values == 0
    if not fits or bool(stored[zeros].any()):
        raise CheckpointError(
            f"{tensor.name!r} in the file is not what was exported; nothing was kept: report this"
        )
    return int(zeros.sum()) if values.dim() > 1 else 0


def export_gguf(
    source: str | Path,
    out: Path,
    *,
    type: str | None = None,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """`export` to GGUF."""
    started = time.perf_counter()
    kind = known_type(type)
    whole = gguf_behind(source)
    words = None if tokenizer_from is None else gguf_behind(tokenizer_from)
    check_out(out, overwrite, whole, words)  # before the minutes that reading such a file takes
    folder = resolve(source, progress.say)
    check_apart(out, folder)
    work = _Export(folder)
    keys, whose = _tokenizer(source, folder, tokenizer_from, work.words)
    planned = work.plan(kind)
    with writing(out), durable.beside(out) as temporary:
        _write(temporary, work, planned, keys, folder.name if whole is None else str(source), progress)
        zeros = _compare(temporary, work, planned, progress)
    return ExportReport(
        source=str(source),
        out=str(out),
        to="gguf",
        architecture=work.architecture.name,
        tokenizer=whose,
        types=dict(Counter(tensor.kind for tensor in planned)),
        tensors=len(planned),
        bytes=out.stat().st_size,
        source_bytes=work.checkpoint.bytes_in(None),
        zeros=zeros,
        seconds=time.perf_counter() - started,
    )


def known_type(type: str | None) -> str | None:
    """The type, in capitals.

    Raises:
        UserError: it is none of those that are written.
    """
    kind = None if type is None else type.upper()
    if kind is not None and kind not in TYPES:
        raise UserError(
            f"type {kind!r} is not written{nearest(kind, TYPES)}; choose one of {', '.join(TYPES)}"
        )
    return kind


def check_out(out: Path, overwrite: bool, *files: Path | None) -> None:
    """Refuse an `out` that is a folder, that exists and may not be replaced, or that is one of the `files`.

    Raises:
        OutputError: it is.
    """
    if out.is_dir():
        raise OutputError(
            f"{out} is a folder; expected a file to write: give --out a name such as {out / 'model.gguf'}"
        )
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another --out or pass --overwrite")
    if any(file is not None and same_place(out, file) for file in files):
        raise OutputError(
            f"{out} is a file of the model itself or of its tokenizer; a source is never overwritten: choose another --out"
        )


def check_apart(out: Path, folder: Path) -> None:
    """Refuse an `out` that is a file of the model in `folder`, or the GGUF file that this came from; raises as `check_out` does."""
    check_out(out, True, *(folder.resolve() / x.name for x in folder.iterdir()), _origin(folder))


def _write(
    path: Path, work: _Export, planned: list[Target], keys: dict[str, Key], name: str, progress: Progress
) -> None:
    import gguf

    inside = Counter(tensor.kind for tensor in planned if len(tensor.shape) > 1 and tensor.name not in _ENDS)
    writer = gguf.GGUFWriter(str(path), work.architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(TYPES[inside.most_common(1)[0][0]].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    adders: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in work.header.items():
        adders[type(value)](f"{work.architecture.name}.{key}", value)
    for key, held in keys.items():
        writer.add_key_value(key, held.value, *held.types)
    for tensor in planned:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        taken = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), taken, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress.phase("exporting", len(planned), "tensors")
    for tensor in planned:
        writer.write_tensor_data(np.concatenate([stored(values, tensor) for values in work.slabs(tensor)]))
        progress.step(tensor.name)
    writer.close()


def _compare(path: Path, work: _Export, planned: list[Target], progress: Progress) -> int:
    """Open the file again and compare every tensor with the checkpoint; returns the zeros that were kept."""
    from gguf import GGUFReader

    zeros = 0
    progress.phase("comparing", len(planned), "tensors")
    for tensor, written in zip(planned, GGUFReader(str(path)).tensors, strict=True):
        if written.name != tensor.name or tuple(map(int, reversed(written.shape))) != tensor.shape:
            raise CheckpointError(
                f"{written.name!r} stands in the place of {tensor.name!r} in the file: report this"
            )
        start = 0
        for values in work.slabs(tensor):
            zeros += check(values, written.data[start : start + len(values)], tensor)
            start += len(values)
        progress.step(tensor.name)
    return zeros


def _tokenizer(
    source: str | Path, folder: Path, named: str | Path | None, words: int
) -> tuple[dict[str, Key], str]:
    """The tokenizer's keys, and whose they are: of the GGUF file that is named, of the one that the model came from, or its own."""
    if named is not None and gguf_behind(named) is None:
        raise UserError(f"--tokenizer-from {named}: expected a GGUF file, or smollm2")
    path = gguf_behind(named if named is not None else source) or _origin(folder)
    if path is None:
        return keys_of_folder(folder, words), str(folder)
    keys = keys_of_gguf(path)
    if len(keys["tokenizer.ggml.tokens"].value) != words:
        raise ModelError(
            f"{path} knows {len(keys['tokenizer.ggml.tokens'].value):,} tokens and the model {words:,}; "
            "pass --tokenizer-from with a GGUF file of the same model"
        )
    return keys, str(path)


def _origin(folder: Path) -> Path | None:
    """The GGUF file that a pruned folder was made from, as its record says, if it is still there."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return gguf_behind(record["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
