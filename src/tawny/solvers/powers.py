"""What multiplies by (H + ρI)⁻¹ in ALPS, for one penalty ρ after another.

Trick: where the hardware multiplies bfloat16, one inverse serves several ρ, by its powers. With bfloat16 factors, which it
needs, that took 17 % off the solving of a whole run (70 to 58 s; docs/log/alps-products.md).
Paid: inverses that are off by 1.7 % at most, which changes losses in the fourth digit.

Elsewhere a product of square matrices costs more than an inverse, and every ρ has its own. Where a weight has few rows for
its columns a Cholesky factor stands for the inverse: two triangular solves take 1.05 to 1.2 times as long as a product, and a
factor takes a third of the time of an inverse.

Shapes: I = in, C = rows of a chunk, R = rows of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from tawny.precision import native_dtype
from tawny.solvers.inverse import factorise, inverse_of_factor

CHUNK = 1 << 22  # weights a product takes at once,
ROWS = 1024  # or so many rows: every product arranges the whole inverse again
CACHED = 1 << 16  # weights whose elementwise work stays in a core's cache
SMALLEST_RHO = 1e-4  # below it float32 cannot factorise H + ρI, and the support has long stopped to care
_GROWTH = 3.5  # how much ρ grows while one inverse serves,
_DEGREE = 3  # by a polynomial of this degree: 1.7 % off at most
_AT_WORK = 1 << 30  # bytes of an inverse and its powers while they serve
_KEPT = 1 << 28  # bytes of these that may wait for another weight with the same input


@dataclass
class Scaled:
    """What the linears that share an input share: the scaling of their Hessian, factors and inverses.

    Where the hardware multiplies bfloat16, one inverse serves while ρ grows by `_GROWTH`: its powers, each a product of
    bfloat16 factors, give the inverses of those ρ (`_nearest`). Where all of them take more than `_AT_WORK` there are two, and
    one more product for each ρ. Elsewhere a product of square matrices costs more than an inverse, and every ρ has its own.
    """

    hessian_II: Tensor  # the caller's, unscaled and undamped
    scale_I: Tensor  # √(H_jj + ridge)
    ridge: float
    damp: float  # the damping that was needed
    rho: float
    # By what and ρ: of a factor L with LLᵀ = H' + ρI, of an inverse X = (H' + ρI)⁻¹, X², …; and H's eigenbasis, for all ρ
    made: dict[tuple[str, float], list[Tensor]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """What the hardware multiplies fastest."""
        return native_dtype() if self.hessian_II.device.type == "cpu" else torch.float32

    def times_inverse(self, rho: float, rows: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """A function of R and S, `[any, in]` of `dtype`, that writes R(H' + ρI)⁻¹ into S, its result; None where float32 cannot tell.

        Args:
            rho: the penalty.
            rows: of the weight that is solved.
        """
        on_cpu = self.hessian_II.device.type == "cpu"
        if on_cpu and self.dtype is torch.float32 and wide(rows, len(self.hessian_II)):
            L_II = self.factor(rho)
            return None if L_II is None else partial(_substitute, L_II)
        X_II = self.inverse(rho)
        return None if X_II is None else partial(_multiply, X_II)

    def factor(self, rho: float) -> Tensor | None:
        """L with LLᵀ = H' + ρI, in its lower triangle; None where float32 cannot tell."""
        if ("factor", rho) not in self.made:
            self.forget(max(self._sizes(), default=0))
            L_II = factorise(self._normalised(rho))
            if L_II is None:
                return None
            self.made["factor", rho] = [L_II]
        return self.made["factor", rho][0]

    def _normalised(self, rho: float) -> Tensor:
        """H' + ρI."""
        A_II = self.hessian_II / self.scale_I
        A_II /= self.scale_I[:, None]
        A_II.diagonal().add_(self.ridge / self.scale_I.square() + rho)
        return A_II

    def eigenbasis(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of H', `[in]` float32, and its eigenvectors, columns of `dtype`."""
        if ("eigenbasis", 0.0) not in self.made:
            self.forget(max(self._sizes(), default=0))
            self.made["eigenbasis", 0.0] = list(eigenbasis(self._normalised(0.0), self.dtype))
        values_I, vectors_II = self.made["eigenbasis", 0.0]
        return values_I, vectors_II

    def inverse(self, rho: float) -> Tensor | None:
        """(H' + ρI)⁻¹; None where float32 cannot tell."""
        near = self.rho * _GROWTH ** math.floor(math.log(rho / self.rho) / math.log(_GROWTH) + 1e-9)
        if self.dtype is torch.float32 or near < SMALLEST_RHO:
            near = rho
        powers = self.made.get(("inverse", near))
        if powers is None:
            L_II = self.factor(near)
            if L_II is None:
                return None
            del self.made["factor", near]  # its memory becomes the inverse
            powers = self.made["inverse", near] = [inverse_of_factor(L_II).to(self.dtype)]
        shift = rho - near
        if shift < 1e-6 * near:
            return powers[0]
        shares = [share * shift**power for power, share in enumerate(_nearest(shift / near))]
        kept = _powers_kept(len(powers[0]), self.dtype)
        while len(powers) < kept:
            powers.append(powers[-1] @ powers[0])
        made_II = torch.empty_like(powers[0])
        for part in parts(made_II, 4 * CACHED):
            made_II[part] = _weighed(powers, shares[:kept], part)
        if kept < len(shares):  # X⁴ = X²X², X³ = X²X
            for part in parts(made_II, max(CHUNK, ROWS * len(made_II))):
                made_II[part].addmm_(_weighed(powers, shares[kept:], part).to(self.dtype), powers[-1])
        return made_II

    def forget(self, beside: int = 0) -> None:
        """Drop the oldest until those that stay, and so many bytes beside them, are few enough to wait."""
        while self.made and beside + sum(self._sizes()) > _KEPT:
            del self.made[next(iter(self.made))]

    def _sizes(self) -> list[int]:
        return [sum(matrix.nbytes for matrix in matrices) for matrices in self.made.values()]


def eigenbasis(A_II: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a matrix that is symmetric and positive: its eigenvalues, none below 0, and its eigenvectors in a dtype of products."""
    values_I, vectors_II = torch.linalg.eigh(A_II)
    return values_I.clamp_(min=0), vectors_II.to(dtype)


def _multiply(X_II: Tensor, R_CI: Tensor, S_CI: Tensor) -> Tensor:
    """S ← RX."""
    return torch.mm(R_CI, X_II, out=S_CI)


def _substitute(L_II: Tensor, R_CI: Tensor, S_CI: Tensor) -> Tensor:
    """S ← R(LLᵀ)⁻¹."""
    torch.linalg.solve_triangular(L_II.T, R_CI, upper=True, left=False, out=S_CI)
    torch.linalg.solve_triangular(L_II, S_CI, upper=False, left=False, out=S_CI)
    return S_CI


def _powers_kept(width: int, dtype: torch.dtype) -> int:
    """How many powers of an inverse of so many inputs are in memory while it serves."""
    whole = _DEGREE + 1
    return whole if whole * width * width * dtype.itemsize <= _AT_WORK else whole // 2


def _weighed(powers: list[Tensor], shares: list[float], rows: slice) -> Tensor:
    """Σ share · power, float32, of some rows."""
    sum_RI = powers[0][rows].to(torch.float32) * shares[0]
    for power_II, share in zip(powers[1:], shares[1:], strict=True):
        sum_RI.add_(power_II[rows], alpha=share)
    return sum_RI


@cache  # linears go through the same penalties
def _nearest(a: float) -> tuple[float, ...]:
    """Coefficients, from the constant on, of the polynomial that is nearest to 1/(1 + x) between 0 and a, as a share of it.

    With X = (H' + ρI)⁻¹, that of H' + (ρ + shift)I is X(I + shift·X)⁻¹, and shift·X has its eigenvalues between 0 and
    a = shift/ρ. The polynomial p has (1 + x)·p(x) = 1 − Tₙ(1 − 2x/a)/Tₙ(1 + 2/a), with the Chebyshev polynomial of n, its
    degree `_DEGREE` and one: it is off by 1/Tₙ(1 + 2/a) at most, for degree 3 by 0.1 % for a = 0.8 and 1.7 % for 2.5.
    """
    chebyshev = Chebyshev.basis(_DEGREE + 1)
    along = chebyshev.convert(kind=Polynomial)(Polynomial([1, -2 / a]))
    quotient = (1 - along / chebyshev(1 + 2 / a)) // Polynomial([1, 1])
    return tuple(float(share) for share in quotient.coef)


def wide(rows: int, width: int) -> bool:
    """Whether a factor for each ρ and two triangular solves an iteration take less time than an inverse and a product."""
    return 2 * rows <= width


def waiting_bytes(width: int) -> int:
    """What is kept for so many inputs while another weight is pruned: two inverses with their powers, or one for each ρ."""
    size = native_dtype().itemsize * width**2
    return min(12 * size, _KEPT) if (_DEGREE + 1) * size <= _KEPT else 0


def serving_bytes(width: int) -> int:
    """What serves for so many inputs beside what waits: powers, the inverse for one ρ and its copy in a product's order."""
    dtype = native_dtype()
    powers = 0 if dtype is torch.float32 else 2 if waiting_bytes(width) else _powers_kept(width, dtype)
    return (2 + powers) * dtype.itemsize * width**2


def parts(T_OI: Tensor, size: int) -> list[slice]:
    """Slices of rows of about `size` weights."""
    rows = max(1, size // max(T_OI.shape[1], 1))
    return [slice(top, min(top + rows, len(T_OI))) for top in range(0, len(T_OI), rows)]
