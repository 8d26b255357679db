"""G, what the model's output feels of errors at a linear's outputs, as solvers use it: damped, and scaled to a diagonal of ones.

With m the mean of G's diagonal and d the damping, as a share of it,

    G + d·m·I = m · R Gn R,   R = diag(r),   r_i = √(G_ii / m + d),   diag(Gn) = 1.

d = damp·(1 + out / tokens): the mean of `tokens` gradients of `out` numbers is off by about √(out / tokens) of itself, so where
few tokens were seen, as by an expert, all outputs count more alike. What no token made felt has r = √d, so nothing divides by 0.

Shapes: O = out, R = rows of a diagonal block, I = in.
"""

from __future__ import annotations

__all__ = ["DAMP", "Damped", "damped", "roots", "row_roots"]

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tawny.calibration.output import OutputFactor
from tawny.errors import NumericalError
from tawny.patterns import Pattern, Scope, Unstructured

DAMP = 0.05


@dataclass(frozen=True)
class Damped:
    """G with damping, apart from its mean."""

    output: OutputFactor
    share: float  # d, as above
    root_O: Tensor  # r, as above, float32

    @property
    def whole(self) -> bool:
        """Whether more than the diagonal is known."""
        return len(self.output.blocks) > 0

    @property
    def places(self) -> list[slice]:
        """The rows of each diagonal block."""
        edges = itertools.accumulate((len(G_RR) for G_RR in self.output.blocks), initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def blocks(self) -> Iterator[Tensor]:
        """[R, R] float32 of each diagonal block: Gn, made when its turn comes."""
        mean = self.output.mean
        for rows, G_RR in zip(self.places, self.output.blocks, strict=True):
            root_R = self.root_O[rows]
            Gn_RR = (G_RR / (mean * root_R)).div_(root_R[:, None])
            Gn_RR.fill_diagonal_(1.0)
            yield Gn_RR

    def through(self, W_OI: Tensor) -> Tensor:
        """A new V with VᵀV = Wᵀ (G / m + d·I) W."""
        V_OI = W_OI * self.root_O[:, None]
        if self.whole:
            for rows, Gn_RR in zip(self.places, self.blocks(), strict=True):
                L_RR, failed = torch.linalg.cholesky_ex(Gn_RR)
                if int(failed):
                    raise NumericalError(f"the output's factor {list(Gn_RR.shape)} is not positive definite")
                V_OI[rows] = L_RR.T @ V_OI[rows]
        return V_OI


def damped(output: OutputFactor | None, damp: float = DAMP) -> Damped | None:
    """G as above; None where it says nothing: no token was seen, or none made anything felt.

    Raises:
        NumericalError: G is not finite.
    """
    if output is None:
        return None
    mean = output.mean
    if not all(bool(torch.isfinite(part.sum())) for part in (output.diagonal, *output.blocks)):
        raise NumericalError("the output's factor holds numbers that are NaN or infinite")
    if output.tokens <= 0 or mean <= 0:
        return None
    share = damp * (1 + len(output.diagonal) / output.tokens)
    return Damped(output, share, (output.diagonal / mean).clamp_(min=0).add_(share).sqrt_())


def roots(output: OutputFactor | None) -> Tensor | None:
    """[out]: r, as above; None where G says nothing."""
    factor = damped(output)
    return None if factor is None else factor.root_O


def row_roots(output: OutputFactor | None, pattern: Pattern, scope: Scope) -> Tensor | None:
    """[out]: what scores of rows are weighed by; None where all rows keep as many weights, over `scope` if the pattern is open."""
    if not isinstance(pattern, Unstructured) or pattern.with_default(scope).scope == "row":
        return None
    return roots(output)
