"""Which matrix of a GGUF file is which matrix of a checkpoint: by what they hold, whatever they are called.

Each row is hashed, so that the order of rows, which llama.cpp's converter changes for some queries and keys, does not matter:
two matrices are one where the sums of their hashes are equal. Sorted hashes then say which row is which. Where no tensor is
the whole of a matrix, several may be it together, as the halves of a gate and its partner are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tawny.errors import ModelError

Digests = npt.NDArray[np.uint64]  # [rows]
Slot = tuple[str, int]  # a tensor of a GGUF file, and which of the matrices in it
EMBEDDING, HEAD = "token_embd.weight", "output.weight"  # llama.cpp calls them so in every architecture


@dataclass(frozen=True)
class Place:
    """Where rows of a matrix of the checkpoint stand in the GGUF file.

    Attributes:
        rows: how many.
        whole: how many the matrix has.
        order: `[rows]` int32, which row of the matrix each of them is; None where the matrix stands there as it is.
    """

    slot: Slot
    rows: int
    whole: int
    order: npt.NDArray[np.int32] | None


def digests(rows: npt.NDArray[np.uint8]) -> Digests:
    """A number for each of the rows `[rows, bytes]`, equal where they are."""
    each = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(each, np.uint64)


def match(
    ours: Mapping[str, Digests], theirs: Mapping[Slot, Digests], ends: Mapping[str, tuple[str, ...]]
) -> dict[str, list[Place]]:
    """Where each of our matrices stands; those that stand nowhere are left out.

    A head that equals the embedding has no place of its own where the file has one tensor for both.

    Args:
        ours: by name, what `digests` gives for a matrix of the checkpoint.
        theirs: by place, the same for those of the file.
        ends: names of the embedding and of the head, in this order, and which tensors they may be; of copies they take these.

    Raises:
        ModelError: two tensors could be one matrix, or two matrices are one tensor.
    """
    slots: dict[tuple[int, int], list[Slot]] = {}
    firsts: dict[int, list[Slot]] = {}
    for slot, rows in theirs.items():
        slots.setdefault(_whole(rows), []).append(slot)
        firsts.setdefault(int(rows[0]), []).append(slot)
    owners: dict[Slot, str] = {}
    places: dict[str, list[Place]] = {}
    for name in dict.fromkeys([*(end for end in ends if end in ours), *ours]):
        rows = ours[name]
        held = slots.get(_whole(rows), [])
        held = _chosen(name, held, ends) if held else _together(rows, theirs, firsts)
        if held and name in ends and owners.get(held[0]) in ends:
            places[name] = []
            continue
        for slot in held:
            if slot in owners:
                raise ModelError(
                    f"{owners[slot]!r} and {name!r} hold the same values, and {slot[0]!r} of the template could be either; "
                    "a template needs matrices that differ"
                )
            owners[slot] = name
        if held:
            places[name] = _places(rows, {slot: theirs[slot] for slot in held})
    return places


def _whole(rows: Digests) -> tuple[int, int]:
    return len(rows), int(rows.sum(dtype=np.uint64))


def _chosen(name: str, held: list[Slot], ends: Mapping[str, tuple[str, ...]]) -> list[Slot]:
    """Those of several equal tensors that a matrix is: one, or both ends where embedding and head are one matrix."""
    if len(held) == 1:
        return held
    own = [
        slot for slot in held if (slot[0] in ends[name] if name in ends else slot[0] not in (EMBEDDING, HEAD))
    ]
    if len(own) != 1 and not (name in ends and own):
        raise ModelError(
            f"{name!r} could be {held[0][0]!r} or {held[1][0]!r} of the template, which are equal; "
            "a template needs matrices that differ"
        )
    return own


def _together(rows: Digests, theirs: Mapping[Slot, Digests], firsts: Mapping[int, list[Slot]]) -> list[Slot]:
    """The tensors that hold all rows of a matrix together, if there are such."""
    begun: Iterable[Slot] = dict.fromkeys(slot for row in rows.tolist() for slot in firsts.get(row, []))
    held = [slot for slot in begun if len(theirs[slot]) < len(rows) and np.isin(theirs[slot], rows).all()]
    held.sort()
    if sum(len(theirs[slot]) for slot in held) != len(rows):
        return []
    joined = np.concatenate([theirs[slot] for slot in held])
    return held if np.array_equal(np.sort(joined), np.sort(rows)) else []


def _places(rows: Digests, held: Mapping[Slot, Digests]) -> list[Place]:
    """Which row is which; equal ones keep their order. Tensors that are copies of one matrix are sorted one by one."""
    if all(len(each) == len(rows) for each in held.values()):
        groups = [{slot: each} for slot, each in held.items()]
    else:
        groups = [dict(held)]
    places = []
    for group in groups:
        joined = np.concatenate(list(group.values()))
        order = np.empty(len(rows), np.int32)
        order[np.argsort(joined, kind="stable")] = np.argsort(rows, kind="stable")
        start = 0
        for slot, each in group.items():
            own = order[start : start + len(each)]
            plain = len(own) == len(rows) and np.array_equal(own, np.arange(len(rows)))
            places.append(Place(slot, len(each), len(rows), None if plain else own))
            start += len(each)
    return places
