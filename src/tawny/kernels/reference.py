"""The kernels in plain torch: slow, obvious, on any device torch has, and what every other kernel is compared with."""

from __future__ import annotations

__all__ = ["check", "expand", "packed_linear"]

import torch
from torch import Tensor

from tawny.packed.format import PackedTensor, _masks_to_bits, unpack


def expand(packed: PackedTensor, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """Dense rows [4·first, min(4·last, out)) of groups `first` to `last`."""
    groups = packed.tensors["masks"].shape[0]
    last = groups if last is None else last
    begin, end = int(packed.tensors["offsets"][first]), int(packed.tensors["offsets"][last])
    tensors = {
        "masks": packed.tensors["masks"][first:last],
        "values": packed.tensors["values"][begin:end],
        "offsets": packed.tensors["offsets"][first : last + 1] - begin,
    }
    if packed.values == "int8":
        scales = packed.tensors["scales"]
        tensors["scales"] = scales[first:last] if packed.group else scales[4 * first : 4 * last]
    rows = min(4 * last, packed.shape[0]) - 4 * first
    return unpack(PackedTensor(tensors, (rows, packed.shape[1]), packed.values, packed.group), dtype)


def packed_linear(x_TI: Tensor, packed: PackedTensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias with the weight expanded to the activations' dtype."""
    return torch.nn.functional.linear(x_TI, expand(packed, x_TI.dtype), bias)


def check(masks_GBR: Tensor, offsets: Tensor, shape: tuple[int, int], nnz: int) -> str | None:
    """The first thing wrong with masks and offsets, or None."""
    out, columns = shape
    if int(offsets[0]) != 0 or int(offsets[-1]) != nnz:
        return "offsets do not run from 0 to the number of survivors"
    for first in range(0, masks_GBR.shape[0], 256):
        bits = _masks_to_bits(masks_GBR[first : first + 256])
        rows = torch.arange(4 * first, 4 * (first + bits.shape[0])).view(-1, 1, 4, 1)
        padding_rows = bits & (rows >= out)
        if bool(padding_rows.any()) or bool(bits[:, -1, :, (columns - 1) % 64 + 1 :].any()):
            return "a mask bit is set in the padding"
        counts = bits.flatten(1).sum(1)
        if not torch.equal(offsets[first : first + 257].diff(), counts):
            return "the masks' population and the offsets disagree"
    return None
