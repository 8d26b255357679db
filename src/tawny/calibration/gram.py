"""Sums of squares `XᵀX` over chunks of tokens: of what goes into a linear, and of the gradients at what comes out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from tawny.precision import bfloat16_products

# Below twice this width the sum is one product; above, only its upper panels are computed.
_PANEL = 512


def add_squares(total_II: Tensor, x_TI: Tensor) -> None:
    """Add `XᵀX` to the upper triangle of `total_II`; below it there may be anything until it is `mirrored`.

    A chunk is summed in float32. Products of bfloat16 inputs are exact there, so the hardware's own for bfloat16 do where there are some.
    """
    x, width = x_TI.to(torch.float32), x_TI.shape[1]
    step = _PANEL if width >= 2 * _PANEL else width
    with bfloat16_products(x_TI.dtype == torch.bfloat16):
        for start in range(0, width, step):
            rows = slice(start, min(start + step, width))
            panel = total_II[rows, start:]
            if panel.dtype == x.dtype:
                panel.addmm_(x[:, rows].T, x[:, start:])
            else:
                panel += x[:, rows].T @ x[:, start:]


def mirrored(total_II: Tensor) -> Tensor:
    """The symmetric matrix of what stands in its upper triangle, in place."""
    total_II.triu_()
    return total_II.add_(total_II.triu(1).T)
