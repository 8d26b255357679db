"""The Cholesky factor and the inverse of a positive definite matrix, by blocks of columns, in its own memory.

LAPACK's two steps, a factor A = LLᵀ and the inverse from it, with every operation but those on diagonal blocks
a large matrix product: n³/3 and 2n³/3 operations at the speed of these. torch's own calls take 1.4 to 2 times as long from about 1500
columns on, and two more copies of the matrix: around the same LAPACK they copy triangles element by element.

With L = [[L_k, 0], [P, L_B]] for a block k and all that follows it, D = L_k⁻¹ and Q = PD, the inverse X has

    X_Bk = −X_BB Q,   X_kk = DᵀD + QᵀX_BB Q,

so that blocks are filled in from the last to the first. X_kk is a sum of what is positive: nothing cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tawny.errors import NumericalError

_BLOCK = 256
_RETRIES = 3

T = TypeVar("T")


def with_damping(damp: float, width: int, attempt: Callable[[float], T | None]) -> T:
    """The first result of `attempt` with `damp`, or with ten times as much, three times at most.

    Raises:
        NumericalError: every attempt gave None.
    """
    for _ in range(1 + _RETRIES):
        result = attempt(damp)
        if result is not None:
            return result
        damp = max(damp * 10, 1e-4)
    raise NumericalError(
        f"the Hessian {[width, width]} cannot be factorised even with damping {damp / 10:g}; "
        "use more calibration samples or a larger solver.damp"
    )


def invert(A_II: Tensor) -> Tensor | None:
    """A⁻¹, in the place of A; None, and A is lost, if a pivot is not positive or not finite.

    Args:
        A_II: `[in, in]`, float32 or float64, symmetric; only its lower triangle is read.
    """
    L_II = factorise(A_II)
    return None if L_II is None else inverse_of_factor(L_II)


def factorise(A_II: Tensor) -> Tensor | None:
    """L with A = LLᵀ, in the place of A, above whose diagonal anything may stand; arguments and None as in `invert`."""
    for k in _blocks(A_II):
        if k.start:
            done = slice(0, k.start)
            A_II[k.start :, k].addmm_(A_II[k.start :, done], A_II[k, done].T, alpha=-1)
        L_KK, info = torch.linalg.cholesky_ex(A_II[k, k])
        if int(info) or not bool(torch.isfinite(L_KK.diagonal()).all()):
            return None
        A_II[k, k] = L_KK
        A_II[k.stop :, k] = A_II[k.stop :, k] @ _inverse_of_block(L_KK).T
    return A_II


def inverse_of_factor(L_II: Tensor) -> Tensor:
    """(LLᵀ)⁻¹, in the place of L."""
    for k in reversed(_blocks(L_II)):
        rest = slice(k.stop, len(L_II))
        D_KK = _inverse_of_block(L_II[k, k])
        Q_BK = L_II[rest, k] @ D_KK
        torch.mm(D_KK.T, D_KK, out=L_II[k, k])
        if not len(Q_BK):
            continue
        X_BK = L_II[rest, rest] @ Q_BK
        L_II[k, k].addmm_(Q_BK.T, X_BK)
        L_II[rest, k] = X_BK.neg_()
        L_II[k, rest] = X_BK.T
    return L_II


def _blocks(A_II: Tensor) -> list[slice]:
    width = len(A_II)
    return [slice(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]


def _inverse_of_block(L_KK: Tensor) -> Tensor:
    inverse_KK: Tensor = torch.linalg.solve_triangular(L_KK, torch.eye(len(L_KK)).to(L_KK), upper=False)
    return inverse_KK
