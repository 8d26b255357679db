"""ALPS: choose the mask and the weights together by ADMM, then refit the survivors.

Meng et al., "ALPS: improved optimization for highly sparse one-shot pruning for large language models",
NeurIPS 2024, 2406.07831. With H and W scaled so that diag(H) = 1, minimise ½‖X(W − B)ᵀ‖² subject to B = D, D
within the pattern. One iteration for a penalty ρ:

    B = (W H − V + ρD)(H + ρI)⁻¹,   T = B + V/ρ,   D = T where the pattern keeps it, else 0,   V ← ρ(T − D)

D and V are the two halves of T, so T, the mask and W H are all the state there is. ρ grows every third
iteration by 1.3, 1.2 or 1.1 as the support changed by > 10 %, > 0.5 % or > 0 of the survivors;
before it has first grown, a small change means that ρ is too large to move anything, and it is divided by 5,
from a fresh start if the support had moved. It ends when the support stands still, or after iteration 30 when
it changes by less than 0.03 %, or at 300. Then masked conjugate gradients (`refit.py`) find the
best values on the support.

What we do differently: a Cholesky factor a ρ instead of one eigendecomposition, so that an iteration costs one
product of a weight with a square matrix; selection looks only at the few values near the last threshold; rows
go through an iteration in chunks, so the scratch memory is three copies of W and three of H.

Promises: the exact budget in every scope and n:m; weights that are already zero go first and stay zero.

Shapes: O = out, I = in, R = rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError, RecipeError
from tawny.patterns import NM, Pattern, Scope, Unstructured, keep_mask, removed_count
from tawny.solvers.base import Needs, Solution, require_finite
from tawny.solvers.refit import refit

__all__ = ["Alps", "Scaled"]

_RETRIES = 3
_CHUNK = 1 << 22  # weights a chunk of rows holds
_CHECK = 3  # iterations between two looks at the support
_SETTLED, _SETTLED_AFTER = 3e-4, 30
_SMALLEST_RHO = 1e-4  # below it float32 cannot factorise H + ρI, and the support has long stopped to care


@dataclass
class Scaled:
    """What the linears that share an input share: the scaling of their Hessian, and one factor."""

    hessian_II: Tensor  # the caller's, unscaled and undamped
    scale_I: Tensor  # √(H_jj + ridge)
    ridge: float
    damp: float  # the damping that was needed
    rho: float
    lower_II: Tensor  # Cholesky factor of H' + ρI for this rho

    def divider(self, rho: float, rows: int) -> _Divider | None:
        """How to multiply a weight of so many rows by (H' + ρI)⁻¹; None where float32 cannot tell."""
        if rho == self.rho:
            return _Divider(self.lower_II, rows)
        lower_II = _factor(self.hessian_II, self.scale_I, self.ridge, rho)
        return None if lower_II is None else _Divider(lower_II, rows)


@dataclass(frozen=True)
class Alps:
    """ADMM finds mask and weights together, then the survivors are refitted; better than sparsegpt, and slower.

    min ‖X(W − Ŵ)‖² s.t. the pattern, Meng et al. 2024 (2406.07831).
    """

    damp: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    steps: int = 10  # of conjugate gradients

    needs: ClassVar[Needs] = "hessian"
    default_scope: ClassVar[Scope] = "matrix"

    def __post_init__(self) -> None:
        for name in ("damp", "rho"):
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"solver.{name} is {getattr(self, name)}; expected a positive number")
        for name in ("iterations", "steps"):
            if getattr(self, name) < 0:
                raise RecipeError(f"solver.{name} is {getattr(self, name)}; expected a count")

    def prepare(self, statistics: Statistics | None) -> Scaled:
        """Damp and scale the Hessian and factorise it for the first ρ, with more damping where it is needed."""
        if statistics is None or statistics.hessian is None:
            raise ValueError("alps needs a Hessian, but no statistics with one were given")
        H_II = statistics.hessian.to(torch.float32)
        require_finite(H_II, "input's Hessian")
        diagonal_I = H_II.diagonal()
        mean = float(diagonal_I.mean()) or 1.0  # a matrix of zeros (an expert that saw no token)
        damp = self.damp
        for _ in range(1 + _RETRIES):
            scale_I = (diagonal_I + damp * mean).clamp(min=1e-6 * mean).sqrt_()
            lower_II = _factor(H_II, scale_I, damp * mean, self.rho)
            if lower_II is not None:
                return Scaled(H_II, scale_I, damp * mean, damp, self.rho, lower_II)
            damp *= 10
        raise NumericalError(
            f"the Hessian {list(H_II.shape)} cannot be factorised even with damping {damp / 10:g}; "
            "use more calibration samples or a larger solver.damp"
        )

    def solve(
        self,
        W_OI: Tensor,
        statistics: Statistics | None,
        pattern: Pattern,
        sparsity: float,
        prepared: Scaled | None = None,
    ) -> Solution:
        require_finite(W_OI, "weight")
        scaled = self.prepare(statistics) if prepared is None else prepared
        notes: dict[str, float | int | str] = {"damp": scaled.damp}
        if isinstance(pattern, Unstructured):
            pattern = pattern.with_default(self.default_scope)
        select = _Selection(W_OI, pattern, removed_count(W_OI.numel(), sparsity))
        if select.trivial:
            keep_OI = select(W_OI.abs())
            return Solution(W_OI.masked_fill(~keep_OI, 0.0), keep_OI, notes)
        T_OI, keep_OI, notes["iterations"], notes["rho"] = self._admm(W_OI, scaled, select)
        T_OI /= scaled.scale_I
        weight_OI = refit(W_OI, keep_OI, scaled.hessian_II, steps=self.steps, start=T_OI, damp=scaled.damp)
        return Solution(weight_OI, keep_OI, notes)

    def _admm(self, W_OI: Tensor, scaled: Scaled, select: _Selection) -> tuple[Tensor, Tensor, int, float]:
        """The last T, its mask, how many iterations it took and the last ρ."""
        survivors = max(select.survivors, 1)
        WH_OI = torch.addmm(W_OI, W_OI, scaled.hessian_II, beta=scaled.ridge).div_(scaled.scale_I)
        T_OI = W_OI * scaled.scale_I
        first_OI = keep_OI = checked_OI = select(T_OI.abs())
        T_OI.masked_fill_(~keep_OI, 0.0)  # D = the best of W, V = 0
        rho = before = self.rho
        grown, divider = False, _Divider(scaled.lower_II, len(W_OI))
        scores_OI = torch.empty_like(T_OI)
        iteration = 0
        for iteration in range(1, self.iterations + 1):
            _iterate(T_OI, keep_OI, WH_OI, divider, rho, before, scores_OI)
            before = rho
            keep_OI = select(scores_OI)
            if iteration % _CHECK:
                continue
            change = int((keep_OI != checked_OI).sum()) / survivors
            checked_OI = keep_OI
            factor = 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1 if change > 0 else 1.0
            if grown or change > 0.005:
                if change == 0 or (iteration >= _SETTLED_AFTER and change < _SETTLED):
                    break
                grown = True
                rho *= factor
            else:
                if rho / 5 < _SMALLEST_RHO:
                    break
                rho /= 5
                if change > 0:
                    T_OI = (W_OI * scaled.scale_I).masked_fill_(~first_OI, 0.0)
                    keep_OI = checked_OI = first_OI
                    before = rho
            fresh = scaled.divider(rho, len(W_OI))
            if fresh is None:
                break
            divider = fresh
        return T_OI, keep_OI, iteration, rho


def _factor(H_II: Tensor, scale_I: Tensor, ridge: float, rho: float) -> Tensor | None:
    """Lower Cholesky factor of H' + ρI, H' = (H + ridge·I)/(scale scaleᵀ); None if not positive definite."""
    A_II = H_II / scale_I
    A_II /= scale_I[:, None]
    A_II.diagonal().add_(ridge / scale_I.square() + rho)
    lower_II: Tensor
    lower_II, info = torch.linalg.cholesky_ex(A_II)
    return None if int(info) or not bool(torch.isfinite(lower_II.diagonal()).all()) else lower_II


class _Divider:
    """A_RI ↦ A (H' + ρI)⁻¹.

    A weight with fewer rows than columns is solved against the factor; for a taller one it pays to form the
    inverse once, which costs as much as solving for a square weight, and to multiply by it until ρ changes.
    """

    def __init__(self, lower_II: Tensor, rows: int) -> None:
        self.lower_II = lower_II
        self.inverse_II: Tensor | None = None
        if rows >= len(lower_II):
            identity = torch.eye(len(lower_II), device=lower_II.device)
            self.inverse_II = torch.cholesky_solve(identity, lower_II)

    def __call__(self, A_RI: Tensor, out: Tensor) -> None:
        if self.inverse_II is None:
            out.copy_(torch.cholesky_solve(A_RI.T, self.lower_II).T)
        else:
            torch.mm(A_RI, self.inverse_II, out=out)


def _iterate(
    T_OI: Tensor,
    keep_OI: Tensor,
    WH_OI: Tensor,
    divider: _Divider,
    rho: float,
    before: float,
    scores_OI: Tensor,
) -> None:
    """One ADMM iteration: T in place, |T| into `scores_OI`. `before` is the ρ that V was made with."""
    rows = max(1, _CHUNK // T_OI.shape[1])
    for top in range(0, T_OI.shape[0], rows):
        part = slice(top, top + rows)
        T_RI, out_RI = T_OI[part], scores_OI[part]
        V_RI = T_RI.masked_fill(keep_OI[part], 0.0).mul_(before)
        # ρD − V, in the place of T: D is what T keeps, V what it does not
        T_RI.mul_(keep_OI[part]).mul_(rho).sub_(V_RI).add_(WH_OI[part])
        divider(T_RI, out_RI)
        torch.add(out_RI, V_RI, alpha=1 / rho, out=T_RI)
        torch.abs(T_RI, out=out_RI)


class _Selection:
    """`keep_mask` for scores that hardly change from call to call; the same mask, most of the work left out.

    Within a matrix only the values within a few percent of the last threshold are looked at closely.
    """

    def __init__(self, W_OI: Tensor, pattern: Pattern, removed: int) -> None:
        self.pattern, self.removed = pattern, removed
        zero_OI = W_OI == 0
        self.zero_OI = zero_OI if bool(zero_OI.any()) else None
        numel = W_OI.numel()
        if isinstance(pattern, NM):
            removed = numel - numel // pattern.m * pattern.n
        self.survivors = numel - removed
        zeros = int(zero_OI.sum())
        enough = isinstance(pattern, Unstructured) and pattern.scope == "matrix" and zeros >= removed
        self.trivial = removed in (0, numel) or enough or zeros == numel
        self.threshold: float | None = None

    def __call__(self, scores_OI: Tensor) -> Tensor:
        """Scores are absolute values and may be overwritten."""
        if self.zero_OI is not None:
            scores_OI = scores_OI.masked_fill_(self.zero_OI, -1.0)
        if self.trivial or not isinstance(self.pattern, Unstructured) or self.pattern.scope != "matrix":
            return keep_mask(scores_OI, self.pattern, self.removed)
        keep_OI = None if self.threshold is None else self._near(scores_OI, self.threshold)
        if keep_OI is None:
            keep_OI = keep_mask(scores_OI, self.pattern, self.removed)
            gone = scores_OI[~keep_OI]
            self.threshold = float(gone.max())
        return keep_OI

    def _near(self, scores_OI: Tensor, last: float) -> Tensor | None:
        low, high = last * 0.95, last * 1.05
        keep_OI = scores_OI > low
        rank = self.removed - (scores_OI.numel() - int(keep_OI.sum()))  # how many above `low` must go
        if rank < 1:
            return None
        flat, keep = scores_OI.view(-1), keep_OI.view(-1)
        near = (keep & (flat <= high)).nonzero().squeeze(1)
        if rank >= near.numel():
            return None
        values = flat[near]
        kept = keep_mask(values[None], Unstructured("matrix"), rank)[0]
        self.threshold = float(values[~kept].max())
        keep[near] = kept
        return keep_OI
