"""How a packed weight lies in memory, and `Weight`, which every kernel takes.

docs/packed-format.md is the specification. A weight [rows, cols] is cut into groups of 4 rows; for each 64 columns a
group holds four masks of 64 bits, and the survivors of those four rows lie one after another.

Shapes: G = ceil(rows / 4) groups, B = ceil(cols / 64) blocks of columns, R = 4 rows of a group, C = 64 columns of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tawny.kinds import Kind

ROWS = 4  # of a group
COLUMNS = 64  # of a block: one mask word


class Weight(NamedTuple):
    """One packed weight. `span` is how many columns a scale covers: 0 for the whole row.

    With exponents, scales are codes of eight bits (kernels/scales.py).
    Without masks and offsets it is whole: every column is stored, those of the padding too.
    """

    masks: Tensor | None
    values: Tensor
    offsets: Tensor | None
    scales: Tensor | None
    exponents: Tensor | None
    sums: Tensor | None
    rows: int
    cols: int
    kind: Kind
    span: int

    @property
    def groups(self) -> int:
        """Of 4 rows."""
        return -(-self.rows // ROWS)

    @property
    def blocks(self) -> int:
        """Of 64 columns."""
        return -(-self.cols // COLUMNS)


def interleave(W_OI: Tensor) -> Tensor:
    """[O, I] → [G, B, R, C], zero where it is padded: the order in which everything is stored."""
    out, columns = W_OI.shape
    padded = torch.nn.functional.pad(W_OI, (0, -columns % COLUMNS, 0, -out % ROWS))
    return (
        padded.view(padded.shape[0] // ROWS, ROWS, padded.shape[1] // COLUMNS, COLUMNS)
        .transpose(1, 2)
        .contiguous()
    )


def deinterleave(W_GBRC: Tensor, rows: int, cols: int) -> Tensor:
    groups, blocks = W_GBRC.shape[:2]
    whole = W_GBRC.transpose(1, 2).reshape(groups * ROWS, blocks * COLUMNS)
    return whole[:rows, :cols].contiguous()


_SHIFTS = torch.arange(8, dtype=torch.uint8)


def bits_to_masks(kept_GBRC: Tensor) -> Tensor:
    """bool [G, B, R, C] → int64 [G, B, R]; bit k of a word is column k, bytes little-endian."""
    octets = kept_GBRC.view(*kept_GBRC.shape[:-1], 8, 8).to(torch.uint8) << _SHIFTS.to(kept_GBRC.device)
    return octets.sum(-1, dtype=torch.uint8).view(torch.int64).squeeze(-1)


def masks_to_bits(masks_GBR: Tensor) -> Tensor:
    octets = masks_GBR.contiguous().unsqueeze(-1).view(torch.uint8)
    return ((octets.unsqueeze(-1) >> _SHIFTS.to(octets.device)) & 1).to(torch.bool).flatten(-2)


def bit_pattern(values: Tensor) -> Tensor:
    """Floats as integers of their size. torch moves a lone float through a scalar, which loses the payload of a NaN."""
    integer = {2: torch.int16, 4: torch.int32}.get(values.dtype.itemsize)
    return values.view(integer) if values.is_floating_point() and integer else values


def place(kept_GBRC: Tensor, survivors: Tensor) -> Tensor:
    """Survivors in their places, zero elsewhere."""
    bits = bit_pattern(survivors)
    found_GBRC = bits.new_zeros(kept_GBRC.shape)
    found_GBRC[kept_GBRC] = bits
    return found_GBRC.view(survivors.dtype)


def spread(scale_GSR: Tensor, blocks: int) -> Tensor:
    """The scales of spans [G, S, R] as float32 [G, B, R, 1], or [G, B, R, C] where a block has several."""
    groups, spans, _ = scale_GSR.shape
    if spans <= blocks:
        scale_GBR = scale_GSR.float().repeat_interleave(-(-blocks // spans), 1)[:, :blocks]
        return scale_GBR.unsqueeze(-1)
    per = spans // blocks
    scale_GBPR = scale_GSR.float().view(groups, blocks, per, ROWS)
    return scale_GBPR.repeat_interleave(COLUMNS // per, 2).transpose(2, 3)
