"""Factors of outputs as a model has them, and slow twins of what takes both factors: by the Kronecker product, in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tawny.calibration.output import OutputFactor


def lifelike_output(
    out: int, tokens: int = 4096, seed: int = 0, scale: float = 1.0, blocks: int = 1
) -> OutputFactor:
    """G of correlated gradients, some outputs much louder than others, by so many diagonal blocks (0: its diagonal alone)."""
    dice = torch.Generator().manual_seed(seed)
    rank = max(1, out // 3)
    g = torch.randn(tokens, rank, generator=dice) @ torch.randn(rank, out, generator=dice) / rank**0.5
    g += 0.3 * torch.randn(tokens, out, generator=dice)
    g *= scale**0.5 * torch.exp(0.7 * torch.randn(out, generator=dice))
    G = g.T @ g / tokens
    edges = [out * place // max(blocks, 1) for place in range(blocks + 1)]
    parts = tuple(G[a:b, a:b].clone() for a, b in itertools.pairwise(edges))
    return OutputFactor(tokens, G.diagonal().clone(), parts)


def damped_exactly(G: OutputFactor, damp: float = 0.05) -> Tensor:
    """[out, out] float64: the diagonal blocks of G over its mean, with its damping, and less of what few tokens say."""
    share = damp * (1 + len(G.diagonal) / G.tokens)
    parts = []
    for part in G.blocks or [torch.diag(G.diagonal)]:
        believed = G.tokens / (G.tokens + 8 * len(part))
        parts.append(believed * part + (1 - believed) * torch.diag(part.diagonal()))
    dense = torch.block_diag(*parts).double() / float(G.diagonal.mean())
    return dense + share * torch.eye(len(dense), dtype=torch.float64)


def refit_exactly(W_OI: Tensor, mask_OI: Tensor, H_II: Tensor, G_OO: Tensor, damp: float = 0.01) -> Tensor:
    """The best survivors of a mask by tr(G(W − Ŵ)(H + λI)(W − Ŵ)ᵀ), all of them by one solve."""
    H = H_II.double()
    both = torch.kron(G_OO.double(), H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64))
    kept = (mask_OI & (W_OI != 0)).flatten().nonzero()[:, 0]
    result = torch.zeros(W_OI.numel(), dtype=torch.float64)
    result[kept] = torch.linalg.solve(both[kept][:, kept], both[kept] @ W_OI.double().flatten())
    return result.view(W_OI.shape)


def felt(W_OI: Tensor, other_OI: Tensor, H_II: Tensor, G_OO: Tensor) -> float:
    """tr(G(W − Ŵ)H(W − Ŵ)ᵀ)."""
    D = W_OI.double() - other_OI.double()
    return float((G_OO.double() @ D @ H_II.double() * D).sum())
