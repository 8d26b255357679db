"""What the model's output feels of an error at one linear's outputs: the factor G of the Fisher information.

Where a weight changes by Δ, the model's output diverges by `½ E[(Σ_t g_tᵀ Δ x_t)²]` to second order, with x a linear's inputs and
g the gradient at its outputs of log p(y), y drawn from the model itself (the true Fisher, not the empirical one of the text's own
tokens). Without the terms between tokens and between x and g that is `½ tr(G Δ H Δᵀ)` nats a token, `G = E[g gᵀ]`, `H = E[x xᵀ]`:
Martens & Grosse 2015 (K-FAC, 1503.05671); van der Ouderaa 2024 (LLM Surgeon, 2312.17244) prunes with it.

G is kept whole up to `BLOCK` outputs, and by diagonal blocks of at most so many beyond, whose cost grows with the outputs only.
"""

from __future__ import annotations

__all__ = ["BLOCK", "FACTORS", "Factor", "OutputAccumulator", "OutputFactor", "diagonal_blocks"]

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Factor = Literal["none", "rows", "whole"]
FACTORS: tuple[Factor, ...] = ("none", "rows", "whole")  # each holds what the ones before it tell
BLOCK = 2048  # outputs: an eigenbasis of so many takes seconds


@dataclass(frozen=True)
class OutputFactor:
    """G at the outputs of ONE linear.

    Attributes:
        tokens: that the linear multiplied; of an expert, those routed to it.
        diagonal: `[out]` float32, E[g_i²] over these tokens, in nats² a squared unit of output.
        blocks: the diagonal blocks of G, each `[rows, rows]` float32, from the first rows to the last; none where only the
            diagonal was asked for.
    """

    tokens: int
    diagonal: Tensor
    blocks: Sequence[Tensor] = ()

    @property
    def mean(self) -> float:
        """The mean of the diagonal."""
        return float(self.diagonal.mean())

    def felt(self, D_OI: Tensor, H_II: Tensor, tokens: int) -> float:
        """½ tr(G D H Dᵀ), in nats a token that the linear multiplies.

        Args:
            D_OI: what the weight changes by.
            H_II: `XᵀX` of `tokens` inputs.
        """
        rows_OI = D_OI @ H_II
        if not self.blocks:
            total = self.diagonal.double() @ torch.linalg.vecdot(rows_OI, D_OI).double()
        else:
            total = self.diagonal.new_zeros((), dtype=torch.float64)
            for rows, G_RR in zip(diagonal_blocks(len(D_OI)), self.blocks, strict=True):
                total += torch.linalg.vecdot(G_RR @ D_OI[rows], rows_OI[rows]).double().sum()
        return 0.5 * float(total) / max(tokens, 1)


def diagonal_blocks(out: int, most: int = BLOCK) -> list[slice]:
    """The rows of each diagonal block: as few blocks as `most` rows allow, of equal size to within one row."""
    count = -(-out // most)
    edges = [out * place // count for place in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


class OutputAccumulator:
    """Adds up G over many chunks of tokens, in float32 where the gradients are narrower."""

    def __init__(self, out: int, factor: Factor, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._diagonal_O = torch.zeros(out, dtype=torch.float64, device=device)
        self._places = diagonal_blocks(out) if factor == "whole" else []
        sizes = [rows.stop - rows.start for rows in self._places]
        self._blocks = [torch.zeros(size, size, device=device) for size in sizes]

    def add(self, g_TO: Tensor) -> None:
        """Gradients `[tokens, out]` of any float dtype."""
        g = g_TO.to(torch.float32)
        self.tokens += len(g)
        self._diagonal_O += g.square().sum(0)
        for rows, G_RR in zip(self._places, self._blocks, strict=True):
            G_RR.addmm_(g[:, rows].T, g[:, rows])

    def finish(self) -> OutputFactor:
        """Means over the tokens; nothing can be added any more."""
        tokens = max(self.tokens, 1)
        for G_RR in self._blocks:
            G_RR /= tokens
        return OutputFactor(self.tokens, (self._diagonal_O / tokens).float(), tuple(self._blocks))
