"""A reader of packed weights written from docs/packed-format.md alone: one weight at a time, no torch arithmetic."""

from __future__ import annotations

from tawny.packed.format import PackedTensor


def read(packed: PackedTensor) -> list[list[float]]:
    """The dense weight as nested lists."""
    out, columns = packed.shape
    masks = packed.tensors["masks"].tolist()
    values = packed.tensors["values"].tolist()
    offsets = packed.tensors["offsets"].tolist()
    scales = packed.tensors["scales"].tolist() if packed.values == "int8" else None
    dense = [[0.0] * columns for _ in range(out)]
    for g in range((out + 3) // 4):
        at = offsets[g]
        for b in range((columns + 63) // 64):
            for r in range(4):
                word = masks[g][b][r] % 2**64
                for k in range(64):
                    if not word >> k & 1:
                        continue
                    value = values[at]
                    at += 1
                    if scales is not None:
                        value *= scales[g][b // 2][r] if packed.group else scales[4 * g + r]
                    dense[4 * g + r][64 * b + k] = value
        assert at == offsets[g + 1]
    return dense
