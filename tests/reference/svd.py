"""Slow, obvious twin of the low-rank solver: the root of H by its eigenvectors, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(W: Tensor, H: Tensor, damp: float, rank: int) -> Tensor:
    """The weight of a rank whose outputs differ least: any root of H gives the same."""
    H = H.double()
    values, vectors = torch.linalg.eigh(H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    root = vectors * values.sqrt()
    U, s, V = torch.linalg.svd(W.double() @ root, full_matrices=False)
    return sum(s[k] * torch.outer(U[:, k], V[k]) for k in range(min(rank, len(s)))) @ torch.linalg.inv(root)
