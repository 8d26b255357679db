"""A reader of packed folders written from docs/packed-format.md alone: bytes and JSON, no torch, no checks but hashes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.reference.packed import dense as weight

_FORMAT = {"I64": "q", "I32": "i", "I8": "b", "U8": "B", "F32": "f", "F16": "e"}


def numbers(data: bytes, dtype: str) -> list[float]:
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    kind = _FORMAT[dtype]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))


def read(folder: Path) -> Iterator[tuple[str, list[list[float]]]]:
    """Name in the dense checkpoint, and dense weight [out][in], of every packed weight; NAME[i] where several share one."""
    index = json.loads((folder / "packed.safetensors.index.json").read_text())
    assert index["metadata"]["format"] == "tawny" and index["metadata"]["version"] == 4

    def tensor(name: str) -> list[float] | None:
        place = index["tensors"].get(name)
        if place is None:
            return None
        data = (folder / place["shard"]).read_bytes()[place["offset"] : place["offset"] + place["bytes"]]
        assert hashlib.sha256(data).hexdigest() == place["sha256"]
        return numbers(data, place["dtype"])

    for name, linear in index["linears"].items():
        out, columns = linear["shape"]
        keys = "masks", "values", "offsets", "scales", "exponents", "sums"
        named = {key: tensor(f"{name}.{key}") for key in keys}
        tensors = {key: found for key, found in named.items() if found is not None}
        assert linear.get("short", False) == ("exponents" in tensors)
        assert linear.get("whole") or tensors["offsets"][-1] == linear["nnz"]
        dense = weight((out, columns), linear["values"], linear["group"], tensors)
        if "index" in linear:
            yield f"{linear['sources'][0]}[{linear['index']}]", dense
        first = 0
        for source, rows in zip(linear["sources"], linear.get("rows", [out] * 2), strict=False):
            if "index" not in linear:
                yield source, dense[first : first + rows]
            first += rows if "rows" in linear else 0
