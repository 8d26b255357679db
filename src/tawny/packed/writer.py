"""Writing a packed folder: shards as tensors come, the index at the end."""

from __future__ import annotations

__all__ = ["PackedWriter"]

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tawny.model.durable import writing
from tawny.model.tensorfile import entries, raw, write_tensors
from tawny.packed import format
from tawny.packed.folder import INDEX, METHOD, PackedLinearEntry
from tawny.packed.format import PackedTensor

SHARD_BYTES = 256_000_000  # what a writer holds at most beside one block


@dataclass
class PackedWriter:
    """Collects tensors, writes a shard whenever enough have come, names shards and writes the index at the end."""

    folder: Path
    limit: int = SHARD_BYTES
    linears: dict[str, PackedLinearEntry] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pending: dict[str, Tensor] = {}
        self._bytes = 0
        self._written: list[Path] = []
        self._tensors: dict[str, dict[str, Any]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size

    def add_packed(self, packed: PackedTensor, entry: PackedLinearEntry) -> int:
        """Returns the bytes it takes."""
        wanted = entry.wanted()
        for key in wanted:
            self.add(f"{entry.name}.{key}", packed.tensors[key])
        self.linears[entry.name] = entry
        return sum(int(packed.tensors[key].nbytes) for key in wanted)

    def _flush(self) -> None:
        path = self.folder / f"packed-{len(self._written) + 1:05d}.safetensors"
        with writing(path):
            write_tensors(path, self._pending)
        places = entries(path)
        for name, tensor in self._pending.items():
            place = places[name]
            self._tensors[name] = {
                "dtype": place.dtype,
                "shape": list(place.shape),
                "shard": path.name,
                "offset": place.start,
                "bytes": place.bytes,
                "sha256": hashlib.sha256(raw(tensor)).hexdigest(),
            }
        self._written.append(path)
        self._pending, self._bytes = {}, 0

    def finish(self, source: list[dict[str, str]], source_index: str | None) -> int:
        """Write what is left and the index; returns the bytes of all tensors.

        `config.json` lies in the folder already: the index knows its hash.
        """
        if self._pending or not self._written:
            self._flush()
        count = len(self._written)
        final = {
            path.name: f"packed-{n:05d}-of-{count:05d}.safetensors" for n, path in enumerate(self._written, 1)
        }
        for entry in self._tensors.values():
            entry["shard"] = final[entry["shard"]]
        total: int = sum(entry["bytes"] for entry in self._tensors.values())
        index = {
            "metadata": {"format": METHOD, "version": format.VERSION, "total_size": total},
            "weight_map": {name: entry["shard"] for name, entry in self._tensors.items()},
            "shards": {final[path.name]: path.stat().st_size for path in self._written},
            "linears": {name: entry.to_dict() for name, entry in self.linears.items()},
            "dense": self.dense,
            "source": source,
            "source_index": source_index,
            "tensors": self._tensors,
            "config_sha256": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
        }
        with writing(self.folder):
            for path in self._written:
                path.rename(self.folder / final[path.name])
            # One entry a line: a megabyte of indentation would be a visible share of a small model.
            (self.folder / INDEX).write_text(
                json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8"
            )
        return total
