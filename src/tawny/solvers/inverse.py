"""The inverse of a positive definite matrix, by blocks of columns, in its own memory.

LAPACK's two steps, a Cholesky factor A = LLᵀ and the inverse from it, with every operation but those on diagonal blocks
a large matrix product: n³ operations at the speed of these. torch's own calls take 1.4 to 2 times as long from about 1500
columns on, and two more copies of the matrix: around the same LAPACK they copy triangles element by element.

With L = [[L_k, 0], [P, L_B]] for a block k and all that follows it, D = L_k⁻¹ and Q = PD, the inverse X has

    X_Bk = −X_BB Q,   X_kk = DᵀD + QᵀX_BB Q,

so that blocks are filled in from the last to the first. X_kk is a sum of what is positive: nothing cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["invert"]

_BLOCK = 256


def invert(A_II: Tensor) -> Tensor | None:
    """A⁻¹, in the place of A; None, and A is lost, if a pivot is not positive or not finite.

    Args:
        A_II: `[in, in]`, float32 or float64, symmetric; only its lower triangle is read.
    """
    width = len(A_II)
    blocks = [slice(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]
    inverses = []
    for k in blocks:
        rest = slice(k.stop, width)
        if k.start:
            done = slice(0, k.start)
            A_II[k.start :, k].addmm_(A_II[k.start :, done], A_II[k, done].T, alpha=-1)
        lower_KK, info = torch.linalg.cholesky_ex(A_II[k, k])
        if int(info) or not bool(torch.isfinite(lower_KK.diagonal()).all()):
            return None
        D_KK = torch.linalg.solve_triangular(lower_KK, torch.eye(len(lower_KK)).to(A_II), upper=False)
        inverses.append(D_KK)
        A_II[rest, k] = A_II[rest, k] @ D_KK.T
    for k, D_KK in zip(reversed(blocks), reversed(inverses), strict=True):
        rest = slice(k.stop, width)
        Q_BK = A_II[rest, k] @ D_KK
        torch.mm(D_KK.T, D_KK, out=A_II[k, k])
        if not len(Q_BK):
            continue
        X_BK = A_II[rest, rest] @ Q_BK
        A_II[k, k].addmm_(Q_BK.T, X_BK)
        A_II[rest, k] = X_BK.neg_()
        A_II[k, rest] = X_BK.T
    return A_II
