"""A reader of packed weights written from docs/packed-format.md alone: one weight at a time, no torch arithmetic."""

from __future__ import annotations

import struct

from tawny.packed.format import PackedTensor

GRIDS = {
    "int6": range(-28, 36),
    "int5": range(-14, 18),
    "int4": (-53, -40, -31, -24, -18, -12, -6, 0, 5, 11, 17, 24, 31, 39, 49, 63),
    "int3": (-48, -29, -15, 0, 12, 24, 39, 63),
    "int2": (-50, -15, 24, 63),
}


def code(chunk: list[int], place: int, bits: int) -> int:
    """Code number `place` of the 64 that a chunk of 8 · bits bytes holds, plane after plane."""
    found, shift, at = 0, 0, 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        per = 8 if width == 1 else 8 * width  # codes whose fields are neighbours, in as many bytes
        byte, field = place % per, place // per
        found |= (chunk[at + byte] >> width * field & 2**width - 1) << shift
        at, shift = at + 8 * width, shift + width
    return found


def long(codes: list[int], exponents: list[int]) -> list[float]:
    """Scales [G, S, 4] of codes of the same order."""
    spans = len(codes) // len(exponents)
    found = []
    for place, code in enumerate(codes):
        row = place // (4 * spans) * 4 + place % 4
        bits = (code & 128) << 8 | (exponents[row] + (code >> 4 & 7)) << 7 | (code & 15) << 3
        found += struct.unpack("<f", b"\0\0" + struct.pack("<H", bits if code else 0))
    return found


def read(packed: PackedTensor) -> list[list[float]]:
    """The dense weight as nested lists."""
    tensors = {name: tensor.flatten().tolist() for name, tensor in packed.tensors.items()}
    return dense(packed.shape, packed.values, packed.group, tensors)


def dense(
    shape: tuple[int, int], kind: str, group: int | None, tensors: dict[str, list[float]]
) -> list[list[float]]:
    """The dense weight, from tensors that are written out one number after another."""
    out, columns = shape
    G, B = -(-out // 4), -(-columns // 64)
    values, scales = tensors["values"], tensors.get("scales")
    if "exponents" in tensors:
        scales = long(scales, tensors["exponents"])
    masks, offsets = tensors.get("masks"), tensors.get("offsets")
    bits = int(kind[3:]) if kind in GRIDS else 0

    def survivor(number: int) -> float:
        if not bits:
            return values[number]
        start = number // 64 * 8 * bits
        return GRIDS[kind][code(values[start : start + 8 * bits], number % 64, bits)]

    found = [[0.0] * columns for _ in range(out)]
    n = 0
    for g in range(G):
        assert offsets is None or n == offsets[g]
        for b in range(B):
            for r in range(4):
                for k in range(64):
                    row, column = 4 * g + r, 64 * b + k
                    inside = row < out and column < columns
                    if offsets is not None and not inside:
                        continue
                    if masks is not None and not int(masks[(g * B + b) * 4 + r]) >> k & 1:
                        continue
                    scale = 1.0
                    if scales is not None:
                        scale = (
                            scales[(g * -(-64 * B // group) + column // group) * 4 + r]
                            if group
                            else scales[row]
                        )
                    if inside:
                        found[row][column] = survivor(n) * scale
                    n += 1
    return found
