"""The kernels in plain torch: slow, obvious, on any device torch has, and what every other kernel is compared with.

They read every kind of the table, those too that no compiled kernel knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tawny.kernels.layout import COLUMNS, ROWS, Weight, deinterleave, masks_to_bits, place, spread
from tawny.kernels.scales import long


def expand(
    weight: Weight, dtype: torch.dtype | None = None, first: int = 0, last: int | None = None
) -> Tensor:
    """Dense rows [4·first, min(4·last, rows)), those of groups `first` to `last`.

    dtype None gives the stored float kind, and float32 for scaled integers.
    """
    last = weight.groups if last is None else last
    if weight.masks is None or weight.offsets is None:
        size = weight.blocks * ROWS * COLUMNS
        W_GBRC = weight.kind.decode(weight.values, first * size, last * size)
        W_GBRC = W_GBRC.view(-1, weight.blocks, ROWS, COLUMNS)
    else:
        kept_GBRC = masks_to_bits(weight.masks[first:last])
        begin, end = int(weight.offsets[first]), int(weight.offsets[last])
        W_GBRC = place(kept_GBRC, weight.kind.decode(weight.values, begin, end))
    if weight.kind.scaled:
        assert weight.scales is not None
        if weight.span:
            scales_GSR = weight.scales[first:last]
            if weight.exponents is not None:
                scales_GSR = long(scales_GSR, weight.exponents[ROWS * first : ROWS * last])
            W_GBRC = W_GBRC * spread(scales_GSR, weight.blocks)
        else:
            W_GBRC = W_GBRC * weight.scales[ROWS * first : ROWS * last].view(-1, 1, ROWS, 1)
    W_OI = deinterleave(W_GBRC, min(ROWS * last, weight.rows) - ROWS * first, weight.cols)
    if weight.kind.scaled:
        # A scale that was rounded up may carry the largest weight past what is finite.
        largest = min(torch.finfo(dtype or torch.float32).max, torch.finfo(W_OI.dtype).max)
        # A scale below zero makes −0.0 of what was removed; packed again, that would count as a survivor.
        W_OI.clamp_(-largest, largest).add_(0.0)
    return W_OI if dtype is None else W_OI.to(dtype)


def packed_linear(x_TI: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias with the weight expanded to the activations' dtype."""
    return torch.nn.functional.linear(x_TI, expand(weight, x_TI.dtype), bias)


def check(masks_GBR: Tensor, offsets: Tensor, rows: int, cols: int, nnz: int) -> str | None:
    """The first thing wrong with masks and offsets, or None."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != nnz:
        return "offsets do not run from 0 to the number of survivors"
    for first in range(0, masks_GBR.shape[0], 256):
        bits = masks_to_bits(masks_GBR[first : first + 256])
        numbers = torch.arange(ROWS * first, ROWS * (first + bits.shape[0])).view(-1, 1, ROWS, 1)
        if bool((bits & (numbers >= rows)).any()) or bool(bits[:, -1, :, (cols - 1) % COLUMNS + 1 :].any()):
            return "a mask bit is set in the padding"
        if not torch.equal(offsets[first : first + 257].diff(), bits.flatten(1).sum(1)):
            return "the masks' population and the offsets disagree"
    return None
