"""A reader of packed folders written from docs/packed-format.md alone: bytes and JSON, no torch, no checks but hashes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

_FORMAT = {"I64": "q", "I32": "i", "I8": "b", "F32": "f", "F16": "e"}


def numbers(data: bytes, dtype: str) -> list[float]:
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    kind = _FORMAT[dtype]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(kind)}{kind}", data))


def read(folder: Path) -> Iterator[tuple[str, list[list[float]]]]:
    """Name in the dense checkpoint, and dense weight [out][in], of every packed weight; NAME[i] where several share one."""
    index = json.loads((folder / "packed.safetensors.index.json").read_text())
    assert index["metadata"]["format"] == "tawny" and index["metadata"]["version"] == 1

    def tensor(name: str) -> list[float] | None:
        place = index["tensors"].get(name)
        if place is None:
            return None
        data = (folder / place["shard"]).read_bytes()[place["offset"] : place["offset"] + place["bytes"]]
        assert hashlib.sha256(data).hexdigest() == place["sha256"]
        return numbers(data, place["dtype"])

    for name, linear in index["linears"].items():
        out, columns = linear["shape"]
        G, B, S = -(-out // 4), -(-columns // 64), -(-columns // 128)
        masks, values = tensor(f"{name}.masks"), tensor(f"{name}.values")
        offsets, scales = tensor(f"{name}.offsets"), tensor(f"{name}.scales")
        assert offsets is not None and values is not None and offsets[G] == linear["nnz"]
        dense = [[0.0] * columns for _ in range(out)]
        n = 0
        for g in range(G):
            for b in range(B):
                for r in range(4):
                    for k in range(min(64, columns - 64 * b)):
                        row, column = 4 * g + r, 64 * b + k
                        if row >= out or (masks is not None and not int(masks[(g * B + b) * 4 + r]) >> k & 1):
                            continue
                        scale = 1.0
                        if scales is not None:
                            scale = scales[(g * S + b // 2) * 4 + r] if linear["group"] else scales[row]
                        dense[row][column] = values[n] * scale
                        n += 1
        if "index" in linear:
            yield f"{linear['sources'][0]}[{linear['index']}]", dense
        first = 0
        for source, rows in zip(linear["sources"], linear.get("rows", [out] * 2), strict=False):
            if "index" not in linear:
                yield source, dense[first : first + rows]
            first += rows if "rows" in linear else 0
