"""Safetensors files, read, written and merged a tensor at a time.

The library writes a file from a dictionary and reads one by mapping it. Both may hold more memory than a run has promised.
The format is simple: eight bytes of header length, a JSON header with the place of every tensor, then the bytes.
What is written here opens everywhere. The same tensors in the same order give the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tawny.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in a file, in bytes from its start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def _entry(value: Mapping[str, Any], base: int) -> TensorEntry:
    """One item of a header; `base` is where the data begins."""
    start, stop = value["data_offsets"]
    return TensorEntry(
        value["dtype"], tuple(map(index, value["shape"])), base + index(start), base + index(stop)
    )


def natural(key: str) -> list[tuple[int, int | str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def entries(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, in the order of its header.

    Raises:
        CheckpointError: the file cannot be read, is truncated or not safetensors.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: Any = json.loads(file.read(size)) if size < 1 << 30 else None
            length = file.seek(0, 2)
        places = {name: _entry(value, 8 + size) for name, value in header.items() if name != "__metadata__"}
        end = 8 + size
        for entry in sorted(places.values(), key=lambda entry: (entry.start, entry.stop)):
            numbers = math.prod(entry.shape) if min(entry.shape, default=0) >= 0 else -1
            width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
            if entry.start != end or (width is not None and entry.bytes != numbers * width):
                raise ValueError("its header contradicts itself")
            end = entry.stop
        if end != length:
            raise ValueError("its length is not what its header says")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch or make it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); fetch or make it again"
        ) from error
    return places


def _layout(specs: Mapping[str, tuple[str, Sequence[int], int]]) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header and places of tensors given as (dtype, shape, bytes); wider dtypes first, so that all are aligned."""
    order = sorted(specs, key=lambda name: -_width(specs[name][0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        dtype, shape, size = specs[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    places = {name: _entry(header[name], 8 + len(text)) for name in order}
    return len(text).to_bytes(8, "little") + text, places


def _sized(
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> dict[str, tuple[str, Sequence[int], int]]:
    return {n: (NAMES[d], s, int(torch.Size(s).numel()) * d.itemsize) for n, (d, s) in specs.items()}


def header_for(specs: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> str:
    """The JSON that a file of these tensors begins with."""
    return _layout(_sized(specs))[0][8:].decode()


def _width(dtype: str) -> int:
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1


def raw(value: Tensor) -> memoryview:
    """The bytes of a tensor; no copy where it lies contiguous in memory."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class TensorWriter:
    """A file whose tensors are known by shape and come one by one, in any order; a context manager.

    Args:
        path: where to write; it is complete when every tensor has come.
        specs: dtype and shape by name.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        for name, (dtype, _) in specs.items():
            if dtype not in NAMES:
                raise CheckpointError(f"{name} is stored as {dtype}, which safetensors has no name for")
        header, self.places = _layout(_sized(specs))
        self._file: IO[bytes] = path.open("wb+")
        self._file.write(header)
        self._file.truncate(max((entry.stop for entry in self.places.values()), default=len(header)))

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, name: str, value: Tensor) -> None:
        self._file.seek(self.places[name].start)
        self._file.write(raw(value))

    def close(self) -> None:
        self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of these tensors."""
    with TensorWriter(path, {n: (t.dtype, t.shape) for n, t in tensors.items()}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)


def read_tensor(file: IO[bytes], entry: TensorEntry) -> Tensor:
    """A tensor of its own memory."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    file.seek(entry.start)
    buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
    if file.readinto(buffer) != entry.bytes:  # type: ignore[attr-defined]
        raise CheckpointError(f"{file.name} ends inside a tensor; it was cut off")
    return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    with path.open("rb") as file:
        return {name: read_tensor(file, entry) for name, entry in entries(path).items()}


def merge(path: Path, pieces: Sequence[tuple[Path, str]]) -> None:
    """A file of tensors that lie in other files, copied without being looked at."""
    headers = {source: entries(source) for source in dict.fromkeys(source for source, _ in pieces)}
    origin = {name: source for source, name in pieces}
    known = {name: headers[source][name] for name, source in origin.items()}
    header, places = _layout({name: (e.dtype, e.shape, e.bytes) for name, e in known.items()})
    with path.open("wb") as out:
        out.write(header)
        for name in places:  # in the order of the file
            with origin[name].open("rb") as file:
                file.seek(known[name].start)
                _copy(file, out, known[name].bytes)


def _copy(source: IO[bytes], target: IO[bytes], left: int) -> None:
    while left:
        data = source.read(min(left, _COPY))
        if not data:
            raise CheckpointError(f"{source.name} ends inside a tensor; it was cut off")
        target.write(data)
        left -= len(data)


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written where `folder` is, or will be."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
