"""The safetensors shards of a checkpoint: how tensors are split over them, what they are called, and their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tawny.model.checkpoint import INDEX
from tawny.model.durable import writing
from tawny.model.tensorfile import write_tensors

SHARD_BYTES = 2_000_000_000


class ShardWriter:
    """Collect tensors, write a safetensors shard whenever enough have come, and name them at the end.

    The split depends on sizes and order only, so the same tensors give the same bytes.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._written: list[tuple[Path, list[str]]] = []
        self.bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            size = value.numel() * value.element_size()
            if self._pending and self._pending_bytes + size > self.limit:
                self._flush()
            self._pending[name] = value.contiguous()
            self._pending_bytes += size
            self.bytes += size

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._written):05d}.safetensors"
        with writing(path):
            write_tensors(path, self._pending)
        self._written.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def close(self, named: Callable[[int], list[str]]) -> dict[str, list[str]]:
        """Write what is left, and name the shards: which tensors are in which."""
        if self._pending or not self._written:
            self._flush()
        names = named(len(self._written))
        with writing(self.folder):
            for name, (path, _) in zip(names, self._written, strict=True):
                path.rename(self.folder / name)
        return {name: keys for name, (_, keys) in zip(names, self._written, strict=True)}

    def finish(self) -> None:
        """Write what is left, and the index of a checkpoint of Hugging Face."""
        shards = self.close(shard_names)
        if len(shards) > 1:
            (self.folder / INDEX).write_bytes(index_of(shards, self.bytes))


def shard_names(count: int) -> list[str]:
    """What Hugging Face calls the shards of a checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(keys: Mapping[str, Sequence[str]], total: int) -> bytes:
    """The index that says which shard holds which tensor."""
    weight_map = {key: name for name, held in keys.items() for key in held}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
