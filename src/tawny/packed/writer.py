"""Writing a packed folder: shards as tensors come, the index at the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tawny.model.checkpoint import METHOD
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.durable import writing
from tawny.model.shards import ShardWriter
from tawny.model.tensorfile import entries, raw
from tawny.packed import format
from tawny.packed.folder import PackedLinearEntry
from tawny.packed.format import PackedTensor

SHARD_BYTES = 256_000_000  # what a writer holds at most beside one block


def _shard_names(count: int) -> list[str]:
    return [f"packed-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


class PackedWriter:
    """Collects tensors and what they are; writes the index at the end."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.linears: dict[str, PackedLinearEntry] = {}
        self.dense: list[str] = []
        self._shards = ShardWriter(folder, limit)
        self._hashes: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        self._shards.add({name: tensor})
        self._hashes[name] = hashlib.sha256(raw(tensor)).hexdigest()

    def add_packed(self, packed: PackedTensor, entry: PackedLinearEntry) -> int:
        """Returns the bytes it takes."""
        stored = packed.tensors
        wanted = entry.wanted()
        for key in wanted:
            self.add(f"{entry.name}.{key}", stored[key])
        self.linears[entry.name] = entry
        return sum(int(stored[key].nbytes) for key in wanted)

    def finish(self, source: list[dict[str, str]], source_index: str | None) -> int:
        """Write what is left and the index; returns the bytes of all tensors.

        `config.json` lies in the folder already: the index knows its hash.
        """
        shards = self._shards.close(_shard_names)
        tensors: dict[str, dict[str, Any]] = {}
        for shard, names in shards.items():
            places = entries(self.folder / shard)
            for name in names:
                place = places[name]
                tensors[name] = {
                    "dtype": place.dtype,
                    "shape": list(place.shape),
                    "shard": shard,
                    "offset": place.start,
                    "bytes": place.bytes,
                    "sha256": self._hashes[name],
                }
        index = {
            "metadata": {"format": METHOD, "version": format.VERSION, "total_size": self._shards.bytes},
            "weight_map": {name: entry["shard"] for name, entry in tensors.items()},
            "shards": {shard: (self.folder / shard).stat().st_size for shard in shards},
            "linears": {name: entry.to_dict() for name, entry in self.linears.items()},
            "dense": self.dense,
            "source": source,
            "source_index": source_index,
            "tensors": tensors,
            "config_sha256": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(),
        }
        with writing(self.folder):
            # One entry a line: a megabyte of indentation would be a visible share of a small model.
            (self.folder / INDEX).write_text(
                json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8"
            )
        return self._shards.bytes
