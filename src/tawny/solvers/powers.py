"""Trick: one inverse of a Hessian serves ALPS for several penalties ρ, by its powers.

What it buys, where the hardware multiplies bfloat16: with bfloat16 factors, which it needs, it took 17 % off the solving of a
whole run (70 to 58 s; docs/log/alps-products.md). Elsewhere a product of square matrices costs more than an inverse, and
every ρ has its own.
Paid: inverses that are off by 1.7 % at most, which changes losses in the fourth digit.

Shapes: I = in, R = rows of a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from tawny.precision import native_dtype
from tawny.solvers.inverse import invert

__all__ = ["CACHED", "CHUNK", "ROWS", "SMALLEST_RHO", "Scaled", "parts", "waiting_bytes"]

CHUNK = 1 << 22  # weights a product takes at once,
ROWS = 1024  # or so many rows: every product arranges the whole inverse again
CACHED = 1 << 16  # weights whose elementwise work stays in a core's cache
SMALLEST_RHO = 1e-4  # below it float32 cannot factorise H + ρI, and the support has long stopped to care
_GROWTH = 3.5  # how much ρ grows while one inverse serves,
_DEGREE = 3  # by a polynomial of this degree: 1.7 % off at most
_KEPT = 1 << 28  # bytes of inverses and their powers that may wait for another weight with the same input


@dataclass
class Scaled:
    """What the linears that share an input share: the scaling of their Hessian, and inverses.

    Where the hardware multiplies bfloat16, one inverse serves while ρ grows by `_GROWTH`: its powers, each a product of
    bfloat16 factors, give the inverses of those ρ (`_nearest`). Where all of them are too large to keep there are two, and
    one more product for each ρ. Elsewhere a product of square matrices costs more than an inverse, and every ρ has its own.
    """

    hessian_II: Tensor  # the caller's, unscaled and undamped
    scale_I: Tensor  # √(H_jj + ridge)
    ridge: float
    damp: float  # the damping that was needed
    rho: float
    powers: dict[float, list[Tensor]] = field(default_factory=dict)  # X = (H' + ρI)⁻¹, X², … by ρ

    def inverse(self, rho: float) -> Tensor | None:
        """(H' + ρI)⁻¹, in the dtype that the hardware multiplies fastest; None where float32 cannot tell."""
        dtype = native_dtype() if self.hessian_II.device.type == "cpu" else torch.float32
        near = self.rho * _GROWTH ** math.floor(math.log(rho / self.rho) / math.log(_GROWTH) + 1e-9)
        if dtype is torch.float32 or near < SMALLEST_RHO:
            near = rho
        powers = self.powers.get(near)
        if powers is None:
            X_II = self._exactly(near, dtype)
            if X_II is None:
                return None
            powers = self.powers[near] = [X_II]
        shift = rho - near
        if shift < 1e-6 * near:
            return powers[0]
        shares = [share * shift**power for power, share in enumerate(_nearest(shift / near))]
        kept = _powers_kept(len(powers[0]), dtype)
        while len(powers) < kept:
            powers.append(powers[-1] @ powers[0])
        made_II = torch.empty_like(powers[0])
        for part in parts(made_II, 4 * CACHED):
            made_II[part] = _weighed(powers, shares[:kept], part)
        if kept < len(shares):  # X⁴ = X²X², X³ = X²X
            for part in parts(made_II, max(CHUNK, ROWS * len(made_II))):
                made_II[part].addmm_(_weighed(powers, shares[kept:], part).to(dtype), powers[-1])
        return made_II

    def forget(self, beside: int = 0) -> None:
        """Drop the oldest inverses until those that stay, and so many bytes beside them, are few enough to wait."""
        while self.powers and beside + sum(self._sizes()) > _KEPT:
            del self.powers[next(iter(self.powers))]

    def _sizes(self) -> list[int]:
        return [sum(X_II.nbytes for X_II in powers) for powers in self.powers.values()]

    def _exactly(self, rho: float, dtype: torch.dtype) -> Tensor | None:
        self.forget(max(self._sizes(), default=0))
        A_II = self.hessian_II / self.scale_I
        A_II /= self.scale_I[:, None]
        A_II.diagonal().add_(self.ridge / self.scale_I.square() + rho)
        X_II = invert(A_II)
        return None if X_II is None else X_II.to(dtype)


def _powers_kept(width: int, dtype: torch.dtype) -> int:
    """How many powers of an inverse of so many inputs are in memory while it serves."""
    whole = _DEGREE + 1
    return whole if whole * width * width * dtype.itemsize <= _KEPT else whole // 2


def _weighed(powers: list[Tensor], shares: list[float], rows: slice) -> Tensor:
    """Σ share · power, float32, of some rows."""
    sum_RI = powers[0][rows].to(torch.float32) * shares[0]
    for power_II, share in zip(powers[1:], shares[1:], strict=True):
        sum_RI.add_(power_II[rows], alpha=share)
    return sum_RI


def _nearest(a: float) -> list[float]:
    """Coefficients, from the constant on, of the polynomial that is nearest to 1/(1 + x) between 0 and a, as a share of it.

    With X = (H' + ρI)⁻¹, that of H' + (ρ + shift)I is X(I + shift·X)⁻¹, and shift·X has its eigenvalues between 0 and
    a = shift/ρ. The polynomial p has (1 + x)·p(x) = 1 − Tₙ(1 − 2x/a)/Tₙ(1 + 2/a), with the Chebyshev polynomial of n, its
    degree `_DEGREE` and one: it is off by 1/Tₙ(1 + 2/a) at most, for degree 3 by 0.1 % for a = 0.8 and 1.7 % for 2.5.
    """
    chebyshev = Chebyshev.basis(_DEGREE + 1)
    along = chebyshev.convert(kind=Polynomial)(Polynomial([1, -2 / a]))
    quotient = (1 - along / chebyshev(1 + 2 / a)) // Polynomial([1, 1])
    return [float(share) for share in quotient.coef]


def waiting_bytes(width: int) -> int:
    """What the inverses for so many inputs take while another weight is pruned: two with their powers, or one for each ρ."""
    dtype = native_dtype()
    kept = min(12 * dtype.itemsize * width**2, _KEPT)
    return kept if _powers_kept(width, dtype) > _DEGREE else 0


def parts(T_OI: Tensor, size: int) -> list[slice]:
    """Slices of rows of about `size` weights."""
    rows = max(1, size // max(T_OI.shape[1], 1))
    return [slice(top, min(top + rows, len(T_OI))) for top in range(0, len(T_OI), rows)]
