"""Weights and inputs that look like a language model's: correlated inputs of low rank, a few loud columns."""

from __future__ import annotations

import torch
from torch import Tensor

from tawny.calibration.statistics import Statistics


def lifelike(
    out: int, width: int, seed: int = 0, tokens: int | None = None, loud: int = 3
) -> tuple[Tensor, Statistics]:
    """A weight `[out, width]` and the statistics of its input, `loud` columns of which are 20 times louder."""
    dice = torch.Generator().manual_seed(seed)
    tokens, rank = tokens or 3 * width, max(3, width // 4)
    hidden = torch.randn(tokens, rank, generator=dice) * torch.linspace(3, 0.1, rank)
    X = hidden @ torch.randn(rank, width, generator=dice) / rank**0.5
    X += 0.3 * torch.randn(tokens, width, generator=dice)
    X *= torch.exp(0.5 * torch.randn(width, generator=dice))
    X[:, torch.randperm(width, generator=dice)[:loud]] *= 20
    W = torch.randn(out, width, generator=dice) * torch.exp(0.3 * torch.randn(out, 1, generator=dice))
    H = X.T @ X
    return W / width**0.5, Statistics(tokens, H.diagonal().clone(), H)
