"""Scales of groups of columns in eight bits: how they are stored where nothing is lost by it.

Scales are bfloat16 otherwise. Solvers choose scales of five significant bits (solvers/grid.py), and those of one row
seldom differ by more than a factor of 2⁸. So a sign, an exponent above the row's own, and four bits after the leading one
are enough:

    scale = 0 for the code 0, else (−1)^sign · (1 + fraction / 16) · 2^(e + exponent − 127)

with `e` the row's number, and `sign`, `exponent` and `fraction` the upper one, the next three and the lower four bits of the code.

Shapes: G groups of R = 4 rows, S spans of columns that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tawny.kernels.layout import ROWS

_FRACTION = 7 - 4  # bits of a bfloat16's fraction that a code does without
_REACH = 7  # exponents above the row's own


def short(scales_GSR: Tensor) -> tuple[Tensor, Tensor] | None:
    """Codes uint8 [G, S, R] and exponents uint8 [4G] of bfloat16 scales; None where they would not come back bit for bit."""
    bits_GSR = scales_GSR.view(torch.int16).int()
    exponents_GSR = bits_GSR >> 7 & 0xFF
    # The row's own exponent is as small as it may be, so that its largest scale has the largest code.
    rows_GR = (exponents_GSR.amax(1) - _REACH).clamp_(min=0)
    codes_GSR = (
        (bits_GSR >> 8 & 0x80) | (exponents_GSR - rows_GR[:, None] << 4) | (bits_GSR >> _FRACTION & 0xF)
    )
    codes_GSR = codes_GSR.where(scales_GSR != 0, 0).to(torch.uint8)
    scales = codes_GSR, rows_GR.to(torch.uint8).flatten()
    return scales if torch.equal(long(*scales).view(torch.int16), scales_GSR.view(torch.int16)) else None


def long(codes_GSR: Tensor, exponents: Tensor) -> Tensor:
    """The bfloat16 scales [G, S, R] of codes and exponents."""
    codes_GSR = codes_GSR.int()
    exponents_GSR = (codes_GSR >> 4 & 7) + exponents.view(-1, 1, ROWS).int()
    bits_GSR = (codes_GSR & 0x80) << 8 | exponents_GSR << 7 | (codes_GSR & 0xF) << _FRACTION
    return bits_GSR.where(codes_GSR != 0, 0).to(torch.int16).view(torch.bfloat16)
