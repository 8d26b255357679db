"""SparseGPT as its paper writes it: invert H, walk the rows of the upper Cholesky factor of H⁻¹, update to the right.

In float64, one column at a time, with no blocking of the updates. Only for weights without zeros and inputs that all
fire; masks are by exact count, the count of a group being its share of the budget with the rest carried on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.grid import rounded, scales
from tests.reference.masks import keep_matrix, keep_nm, keep_rows


def sparsegpt(
    W_OI: Tensor,
    H_II: Tensor,
    *,
    removed: int = 0,
    nm: tuple[int, int] | None = None,
    by_row: bool = False,
    group: int = 128,
    damp: float = 0.01,
    levels: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """(pruned weight in float64, mask); with `levels`, survivors are rounded by a scale for each group of columns."""
    W, H = W_OI.double().clone(), H_II.double().clone()
    out, width = W.shape
    H += damp * H.diagonal().mean() * torch.eye(width)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    keep = torch.ones(out, width, dtype=torch.bool)
    size = group if nm is None else nm[1]

    def due(columns: int, budget: int) -> int:
        """How much of a budget is spent after so many columns, rounded half up."""
        return (2 * columns * budget + width) // (2 * width)

    for j in range(width):
        if j % size == 0:
            stop = min(j + size, width)
            scores = (W[:, j:stop] ** 2 / U.diagonal()[j:stop] ** 2).sqrt()
            if nm is not None:
                keep[:, j:stop] = keep_nm(scores, *nm)
            elif by_row:
                budgets = [(row + 1) * removed // out - row * removed // out for row in range(out)]
                keep[:, j:stop] = keep_rows(scores, [due(stop, b) - due(j, b) for b in budgets])
            else:
                # Columns of a group compete in the order in which the sweep stores them: column by column.
                keep[:, j:stop] = keep_matrix(scores.T, due(stop, removed) - due(j, removed)).T
            if levels:
                by = 1 / U.diagonal()[j:stop] ** 2 * keep[:, j:stop]
                scale = scales(W[:, j:stop], by, levels, size).double()
        wanted = W[:, j] * keep[:, j]
        if levels:
            wanted = rounded(W[:, j : j + 1], scale, keep[:, j : j + 1], levels, 1)[:, 0]
        error = (W[:, j] - wanted) / U[j, j]
        W[:, j] = wanted
        W[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
    return W, keep
