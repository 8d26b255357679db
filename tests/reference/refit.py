"""The slow twin of `solvers/refit.py`: a Cholesky factorisation per row, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def refit_exactly(W_OI: Tensor, mask_OI: Tensor, H_II: Tensor, damp: float = 0.01) -> Tensor:
    A = H_II.double()
    A = A + damp * A.diagonal().mean() * torch.eye(len(A), dtype=torch.float64)
    W = W_OI.double()
    result = torch.zeros_like(W)
    for row in range(W.shape[0]):
        kept = (mask_OI[row] & (W_OI[row] != 0)).nonzero().flatten()
        if len(kept):
            factor = torch.linalg.cholesky(A[kept][:, kept])
            right = (A[kept] @ W[row])[:, None]
            result[row, kept] = torch.cholesky_solve(right, factor)[:, 0]
    return result


def objective(W_OI: Tensor, pruned_OI: Tensor, H_II: Tensor, damp: float = 0.0) -> float:
    """tr((W − Ŵ)(H + λI)(W − Ŵ)ᵀ)."""
    A = H_II.double()
    A = A + damp * A.diagonal().mean() * torch.eye(len(A), dtype=torch.float64)
    D = W_OI.double() - pruned_OI.double()
    return float(torch.trace(D @ A @ D.T))
