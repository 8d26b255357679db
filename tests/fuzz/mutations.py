"""Seeded damage to bytes and to JSON: what disks, editors and converters do to files."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

OTHER_TYPES = [None, True, False, 0, -1, 3, 2**40, 0.5, -2.5, math.nan, math.inf]
OTHER_TYPES += ["", "x", "0.5", [], [1], {}, {"a": 1}]
MOST = 10**6  # a larger size would test the machine's memory


def mutate_bytes(data: bytes, rng: Random, end: int | None = None) -> bytes:
    """One change within the first `end` bytes: flipped, cut, doubled, removed or overwritten."""
    made, end = bytearray(data), min(len(data), end or len(data))
    at = rng.randrange(max(1, end))
    size = rng.choice([1, 2, 7, 64])
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice([1, 1, 3])):
                made[rng.randrange(end)] ^= 1 << rng.randrange(8)
        case 1:
            del made[at:]
        case 2:
            made[at:at] = made[at : at + size]
        case 3:
            del made[at : at + size]
        case 4:
            made[at : at + size] = rng.randbytes(min(size, len(made) - at))
        case _:
            made[at : at + size] = bytes(min(size, len(made) - at))
    return bytes(made)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        found.append((value, key))
        _places(child, found)
    return found


def mutate_value(value: Any, rng: Random) -> Any:
    """The same tree with one node of another type or number, removed, doubled, renamed or exchanged."""
    made = json.loads(json.dumps(value))
    owner, key = rng.choice(_places(made, []))
    old = owner[key]
    match rng.randrange(6):
        case 0 | 1:
            owner[key] = rng.choice(OTHER_TYPES)
        case 2 | 3 if isinstance(old, int | float) and not isinstance(old, bool):
            owner[key] = rng.choice(
                [0, -old, old + 1, old - 1, old * 2, old / 2, min(old * 1000, MOST), old // 2]
            )
        case 4 if isinstance(owner, dict):
            owner[f"{key}{rng.choice('sx_')}"] = owner.pop(key)
        case 5:
            other, place = rng.choice(_places(made, []))
            if not _places(old, []) and not _places(other[place], []):
                owner[key], other[place] = other[place], old
        case _:
            del owner[key]
    return made


def mutate_json(data: bytes, rng: Random) -> bytes:
    """A JSON text with one damage, half of the time to what it says and half of the time to its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_value(json.loads(data), rng), indent=1).encode()


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file with damaged bytes, or with a well-formed header that says something else."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, rng.choice([8, 8 + length, len(data)]))
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.5:
        entry = rng.choice([e for e in header.values() if "shape" in e])
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [math.prod(entry["shape"])]])
    else:
        header = mutate_value(header, rng)
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(length)  # the same place for the data, where that is possible
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
