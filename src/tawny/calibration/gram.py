"""Sums of squares `XᵀX` over chunks of tokens: of what goes into a linear, and of the gradients at what comes out of it."""

from __future__ import annotations

from torch import Tensor

from tawny.precision import bfloat16_products

# Below twice this width the sum is one product; above, only its upper panels are computed.
_PANEL = 512


def add_squares(total_II: Tensor, x_TI: Tensor, exact: bool) -> None:
    """Add `XᵀX` to the upper triangle of `total_II`; below it there may be anything until it is `mirrored`.

    Args:
        x_TI: float32; products and sums of a chunk are.
        exact: all values are those of bfloat16. Their products are exact in float32, so the hardware's own do where there are some.
    """
    width = x_TI.shape[1]
    step = _PANEL if width >= 2 * _PANEL else width
    with bfloat16_products(exact):
        for start in range(0, width, step):
            rows = slice(start, min(start + step, width))
            panel = total_II[rows, start:]
            if panel.dtype == x_TI.dtype:
                panel.addmm_(x_TI[:, rows].T, x_TI[:, start:])
            else:
                panel += x_TI[:, rows].T @ x_TI[:, start:]


def mirrored(total_II: Tensor) -> Tensor:
    """The symmetric matrix of what stands in its upper triangle, in place."""
    total_II.triu_()
    return total_II.add_(total_II.triu(1).T)
