"""`tawny export --to gguf` of the architectures that Tawny itself lays out, a tensor at a time.

Floats are written as they are. For every other type such a file is a template that is filled and thrown away (template.py).
The finished file is opened again, and every tensor is compared with the checkpoint before the file has its name.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawny.errors import CheckpointError, ModelError, UserError
from tawny.exporting.architectures import ARCHITECTURES, CONVERTER, Architecture, metadata, rope_factors
from tawny.exporting.files import ExportReport, check_apart, check_out, origin
from tawny.exporting.matching import Place
from tawny.exporting.rounding import FLOATS, Rounding, floats, known_type
from tawny.exporting.template import Matrices, Template, file_type
from tawny.exporting.tokenizer import Key, keys_of_folder, keys_of_gguf
from tawny.model import durable
from tawny.model.checkpoint import Unit
from tawny.model.durable import writing
from tawny.model.gguf_header import open_gguf
from tawny.model.source import gguf_behind, resolve
from tawny.progress import Progress, silent

_ROWS = 4096  # converted at a time


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file: where its numbers come from and how they are stored."""

    name: str
    shape: tuple[int, ...]
    kind: str
    unit: Unit | None


class _Export:
    """A checkpoint seen as a GGUF model."""

    def __init__(self, folder: Path) -> None:
        self.matrices = Matrices.of(folder)
        self.checkpoint, self.model = self.matrices.checkpoint, self.matrices.model
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

    def plan(self, kind: str | None) -> list[FileTensor]:
        """Every tensor of the file, in its order; without a `kind` matrices keep the type they have."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture.name)
        names = get_tensor_name_map(arch, int(self.header["block_count"]))
        stored = self.checkpoint.storage_dtype
        kind = kind or next((name for name, dtype in FLOATS.items() if dtype == stored), "F32")
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
                planned.append(FileTensor(name, shape, kind if len(shape) > 1 else "F32", unit))
        if self.factors is not None:
            planned.append(FileTensor("rope_freqs.weight", tuple(self.factors.shape), "F32", None))
        return planned

    def slabs(self, tensor: FileTensor) -> Iterator[Tensor]:
        """The numbers of a tensor as llama.cpp wants them, float32, some rows at a time."""
        if tensor.unit is None:
            assert self.factors is not None
            yield self.factors
            return
        whole = next(iter(self.checkpoint.load(tensor.unit, self.model).values()))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            whole = self._changed(tensor.name, whole)
        for start in range(0, len(whole), _ROWS):
            values = whole[start : start + _ROWS].float()
            yield self._changed(tensor.name, values) if tensor.name.endswith("norm.weight") else values

    def _changed(self, name: str, values: Tensor) -> Tensor:
        heads, key_heads = (int(self.header[f"attention.head_count{end}"]) for end in ("", "_kv"))
        return self.architecture.changed(name, values, heads, key_heads)

    def places(self, planned: list[FileTensor]) -> dict[str, list[Place]]:
        """Where each matrix stands in the file."""
        names = {self.matrices.key(name): name for name in self.matrices.names}
        places = {}
        for tensor in planned:
            if tensor.unit is None or len(tensor.shape) < 2:
                continue
            rows = tensor.shape[0]
            plain = torch.arange(rows, dtype=torch.int32)
            order = self._changed(tensor.name, plain)
            places[names[tensor.unit.targets[0]]] = [
                Place((tensor.name, 0), rows, rows, None if torch.equal(order, plain) else order.numpy())
            ]
        return places


def _check(values: Tensor, data: Any, tensor: FileTensor) -> int:
    """Compare what is in the file with what was meant; returns how many exact zeros were kept."""
    import gguf

    held = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.kind]).copy())
    if not torch.equal(held.view_as(values), values.to(FLOATS[tensor.kind]).float()):
        raise CheckpointError(
            f"{tensor.name!r} in the file is not what was exported; nothing was kept: report this"
        )
    return int((values == 0).sum()) if values.dim() > 1 else 0


def export_gguf(
    source: str | Path,
    out: Path,
    *,
    type: str | None = None,
    tokenizer_from: str | Path | None = None,
    imatrix: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """`export` to GGUF."""
    started = time.perf_counter()
    kind = known_type(type)
    whole = gguf_behind(source)
    words = None if tokenizer_from is None else gguf_behind(tokenizer_from)
    check_out(out, overwrite, whole, words, imatrix)  # before the minutes that reading such a file takes
    folder = resolve(source, progress.say)
    check_apart(out, folder)
    work = _Export(folder)
    keys, whose = _tokenizer(source, folder, tokenizer_from, work.words)
    rounding = Rounding(work.matrices, kind, imatrix)
    planned = work.plan(None if rounding.rounds else kind)
    with writing(out), _first(out, rounding.rounds) as plain:
        _write(plain, work, planned, keys, folder.name if whole is None else str(source), progress)
        zeros, types = _compare(plain, work, planned, progress), dict(Counter(x.kind for x in planned))
        if rounding.rounds:
            template = Template(plain, open_gguf(plain), work.places(planned))
            types, zeros = rounding.fill(template, out, set(), progress)
    return ExportReport(
        source=str(source),
        out=str(out),
        to="gguf",
        architecture=work.architecture.name,
        tokenizer=whose,
        types=types,
        tensors=len(planned),
        bytes=out.stat().st_size,
        source_bytes=work.checkpoint.bytes_in(None),
        zeros=zeros,
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _first(out: Path, filled: bool) -> Iterator[Path]:
    """Where the file of floats is written: under a name that becomes `out`, or one that goes when `out` was made of it."""
    if filled:
        plain = durable.temporary(out.with_name(f"{out.name}.plain"))
        try:
            yield plain
        finally:
            plain.unlink(missing_ok=True)
    else:
        with durable.beside(out) as plain:
            yield plain


def _write(
    path: Path, work: _Export, planned: list[FileTensor], keys: dict[str, Key], name: str, progress: Progress
) -> None:
    import gguf

    inside = next(tensor.kind for tensor in planned if len(tensor.shape) > 1)
    writer = gguf.GGUFWriter(str(path), work.architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type(inside))
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
        writer.write_tensor_data(
            np.concatenate([floats(values, tensor.name, tensor.kind) for values in work.slabs(tensor)])
        )
        progress.step(tensor.name)
    writer.close()


def _compare(path: Path, work: _Export, planned: list[FileTensor], progress: Progress) -> int:
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
            zeros += _check(values, written.data[start : start + len(values)], tensor)
            start += len(values)
        progress.step(tensor.name)
    return zeros


def _tokenizer(
    source: str | Path, folder: Path, named: str | Path | None, words: int
) -> tuple[dict[str, Key], str]:
    """The tokenizer's keys, and whose they are: of the GGUF file that is named, of the one that the model came from, or its own."""
    if named is not None and gguf_behind(named) is None:
        raise UserError(f"--tokenizer-from {named}: expected a GGUF file, or smollm2")
    path = gguf_behind(named if named is not None else source) or origin(folder)
    if path is None:
        return keys_of_folder(folder, words), str(folder)
    keys = keys_of_gguf(path)
    if len(keys["tokenizer.ggml.tokens"].value) != words:
        raise ModelError(
            f"{path} knows {len(keys['tokenizer.ggml.tokens'].value):,} tokens and the model {words:,}; "
            "pass --tokenizer-from with a GGUF file of the same model"
        )
    return keys, str(path)
