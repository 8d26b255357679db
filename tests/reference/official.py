"""What the authors of Wanda and OWL publish as code, restated for single tensors from the description of what it does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def wanda_mask(W_OI: Tensor, squared_norms_I: Tensor, sparsity: float) -> Tensor:
    """True = kept: in every row the first ⌊in·s⌋ of a stable ascending sort of |w|·‖x‖ go."""
    metric = W_OI.abs() * squared_norms_I.sqrt().reshape(1, -1)
    order = metric.sort(dim=1, stable=True).indices
    keep = torch.ones(W_OI.shape, dtype=torch.bool)
    for row, first in enumerate(order[:, : int(W_OI.shape[1] * sparsity)]):
        for column in first.tolist():
            keep[row, column] = False
    return keep


def outlier_share(block: list[tuple[Tensor, Tensor]], M: float) -> float:
    """In %: scores above M times the mean of all scores of a block, which are laid end to end in float32."""
    scores = torch.cat([(W.abs() * squared.sqrt().reshape(1, -1)).flatten() for W, squared in block])
    return float((scores > torch.mean(scores) * M).sum()) / scores.numel() * 100


def owl_sparsity(shares: list[float], lam: float, target: float) -> list[float]:
    ratio = np.array(shares)
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * lam * 2)
    ratio = ratio - np.mean(ratio) + (1 - target)
    return [float(s) if s > 0 else 0.01 for s in 1 - ratio]
