"""SparseGPT: remove column by column, and let the columns to the right make up for what was lost.

Frantar & Alistarh, "SparseGPT: massive language models can be accurately pruned in one shot", 2301.00774.

The paper walks the upper Cholesky factor U of H⁻¹. We walk the same path with half of the factor's work:
write H = R Rᵀ with R *upper* triangular (the Cholesky factor of H read from its last corner). Then U = R⁻¹,
so that U_jj = 1/R_jj, and the squared output error ‖X(W − Ŵ)ᵀ‖² = ‖(W − Ŵ) R‖² splits into one term a column.
With the columns left of j fixed, the value of column j that makes its term vanish is

    v_j = w_j + Σ_{i<j} (w_i − ŵ_i) R_ij / R_jj ,

and setting it to zero instead costs (v_j R_jj)² = v_j²/U_jj², the paper's score. H is never inverted, and the
sweep looks left only: a group of columns gathers all earlier corrections in one matrix product when its turn
comes.

Promises: the budget is exact (the rounding remainder is carried from group to group); the mask of n:m is
chosen from weights that are already updated; inputs that never fire lose their weights first, smallest
magnitude first, and are never allowed to influence others; a Hessian that cannot be factorised gets ten times
the damping, three times, and then is an error, never an identity.

Shapes: O = out, I = in, J = the columns of one group; tensors `_IO` hold a column of W in each row,
contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError, RecipeError
from tawny.patterns import (
    NM,
    Pattern,
    Scope,
    Unstructured,
    keep_mask,
    keep_mask_rows,
    removed_count,
    rows_removed,
)
from tawny.solvers.base import Needs, Solution, require_finite

__all__ = ["Factor", "SparseGPT"]

_RETRIES = 3
_STEP = 16  # columns that are corrected by matrix-vector products before the next matrix-matrix product


@dataclass(frozen=True)
class Factor:
    """What a sweep needs of a Hessian; shared by the linears that share their input."""

    ratios_II: Tensor  # strictly lower part: [j, i] = R_ij / R_jj
    diagonal_I: Tensor  # R_jj
    dead_I: Tensor  # bool, inputs that were zero for every token
    damp: float  # the damping that was needed


@dataclass(frozen=True)
class SparseGPT:
    """Column by column, with the error spread over the columns that follow; the most accurate.

    Score w²/[H⁻¹]_jj over groups of columns, H = XᵀX + damp·mean(diag)·I, Frantar 2023 (2301.00774).
    """

    damp: float = 0.01
    group: int = 128

    needs: ClassVar[Needs] = "hessian"
    default_scope: ClassVar[Scope] = "matrix"

    def __post_init__(self) -> None:
        if not 0 <= self.damp < float("inf"):
            raise RecipeError(
                f"solver.damp is {self.damp}; expected a number that is not negative, such as 0.01"
            )
        if self.group < 1:
            raise RecipeError(
                f"solver.group is {self.group}; expected a positive number of columns, such as 128"
            )

    def prepare(self, statistics: Statistics | None) -> Factor:
        """Factorise the damped Hessian, with more damping where it is needed."""
        if statistics is None or statistics.hessian is None:
            raise ValueError("sparsegpt needs a Hessian, but no statistics with one were given")
        require_finite(statistics.hessian, "input's Hessian")
        diagonal_I = statistics.hessian.diagonal().float()
        dead_I = diagonal_I <= 0
        # A matrix of zeros (an expert that saw no token) still needs a diagonal; any value serves.
        mean = float(diagonal_I.mean()) or 1.0
        damp = self.damp
        for _ in range(1 + _RETRIES):
            # Read from the last corner, so that the lower factor, turned back, is the upper R of H = R Rᵀ.
            H_II = statistics.hessian.float().flip(0, 1)
            H_II.diagonal().add_(damp * mean).add_(dead_I.flip(0), alpha=mean)
            lower_II, info = torch.linalg.cholesky_ex(H_II)
            # [j, i] of the turned lower factor, transposed, is R_ij.
            ratios_II = lower_II.t().flip(0, 1)
            scale_I = ratios_II.diagonal().clone()
            ratios_II /= scale_I[:, None]
            if int(info) == 0 and torch.isfinite(ratios_II.sum()):
                return Factor(ratios_II, scale_I, dead_I, damp)
            damp = max(damp * 10, 1e-4)
        shape = list(statistics.hessian.shape)
        raise NumericalError(
            f"the Hessian {shape} cannot be factorised even with damping {damp / 10:g}; "
            "use more calibration samples or a larger solver.damp"
        )

    def solve(
        self,
        W_OI: Tensor,
        statistics: Statistics | None,
        pattern: Pattern,
        sparsity: float,
        prepared: Factor | None = None,
    ) -> Solution:
        require_finite(W_OI, "weight")
        factor = self.prepare(statistics) if prepared is None else prepared
        notes: dict[str, float | int | str] = {"damp": factor.damp, "dead_inputs": int(factor.dead_I.sum())}
        if isinstance(pattern, NM):
            weight_OI, keep_OI = self._sweep(W_OI, factor, pattern, None)
        else:
            pattern = pattern.with_default(self.default_scope)
            removed = removed_count(W_OI.numel(), sparsity)
            if removed == 0:
                return Solution(W_OI.clone(), torch.ones_like(W_OI, dtype=torch.bool), notes)
            quota = _quotas(W_OI, factor.dead_I, pattern, removed, self.group)
            weight_OI, keep_OI = self._sweep(W_OI, factor, pattern, quota)
        require_finite(weight_OI, "pruned weight")
        return Solution(weight_OI, keep_OI, notes)

    def _sweep(
        self, W_OI: Tensor, factor: Factor, pattern: Pattern, quota: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Walk the columns once; `quota` [groups, rows or 1] is what each group removes, None for n:m."""
        out, width = W_OI.shape
        group, step = self.group, _STEP
        if isinstance(pattern, NM):
            group, step = max(group // pattern.m, 1) * pattern.m, pattern.m
        ratios_II = factor.ratios_II
        W_IO = W_OI.t().contiguous()  # becomes the pruned weight
        lost_IO = torch.empty_like(W_IO)  # w − ŵ
        V_JO = W_OI.new_empty(min(group, width), out)
        keep_OI = torch.empty(W_OI.shape, dtype=torch.bool, device=W_OI.device)
        for start in range(0, width, group):
            stop = min(start + group, width)
            V = V_JO[: stop - start]
            torch.addmm(W_IO[start:stop], ratios_II[start:stop, :start], lost_IO[:start], out=V)
            if quota is not None:
                scores_OJ = _scores(V, W_IO, factor, start, stop)
                keep_OI[:, start:stop] = _choose(scores_OJ, quota[start // group])
            for left in range(start, stop, step):
                right = min(left + step, stop)
                V = V_JO[left - start : right - start]
                if left > start:
                    V.addmm_(ratios_II[left:right, start:left], lost_IO[start:left])
                if quota is None:
                    keep_OI[:, left:right] = keep_mask(_scores(V, W_IO, factor, left, right), pattern, 0)
                keep_JO = keep_OI[:, left:right].t().to(W_OI.dtype).contiguous()
                for j in range(left, right):
                    v_O = V[j - left]
                    if j > left:
                        v_O.addmv_(lost_IO[left:j].t(), ratios_II[j, left:j])
                    torch.addcmul(W_IO[j], v_O, keep_JO[j - left], value=-1, out=lost_IO[j])
            W_IO[start:stop] = V_JO[: stop - start]
        return W_IO.t().contiguous().masked_fill_(~keep_OI, 0.0), keep_OI


def _scores(V_JO: Tensor, W_IO: Tensor, factor: Factor, start: int, stop: int) -> Tensor:
    """|v|/U_jj; below every live score the weights of dead inputs by magnitude, and below these the zeros."""
    scores_JO = V_JO.abs().mul_(factor.diagonal_I[start:stop, None])
    dead_J = factor.dead_I[start:stop]
    if dead_J.any():
        scores_JO[dead_J] = -1 / V_JO[dead_J].abs()
    scores_JO.masked_fill_(W_IO[start:stop] == 0, -torch.inf)
    return scores_JO.t().contiguous()


def _choose(scores_OJ: Tensor, quota: Tensor) -> Tensor:
    """The group's mask, its quota being one number or one a row."""
    if len(quota) == 1:
        return keep_mask(scores_OJ, Unstructured("matrix"), int(quota))
    return keep_mask_rows(scores_OJ, quota)


def _quotas(W_OI: Tensor, dead_I: Tensor, pattern: Unstructured, removed: int, group: int) -> Tensor:
    """[groups, 1 or out] int64: how many weights each group of columns removes; the sum is exact.

    Zeros go first, then weights of dead inputs, then the live ones in equal shares; what rounding leaves is
    carried on to the next group.
    """
    zero_OI = W_OI == 0
    dead_OI = ~zero_OI & dead_I
    by_row = pattern.scope == "row"
    remaining_R = rows_removed(len(W_OI), removed) if by_row else torch.tensor([removed])
    quota_GR = torch.zeros((), dtype=torch.int64)
    for tier_OI in (zero_OI, dead_OI, ~zero_OI & ~dead_I):
        counts = [
            part.sum(1) if by_row else part.sum().reshape(1) for part in torch.split(tier_OI, group, dim=1)
        ]
        counts_GR = torch.stack(counts).cpu()
        total_R = counts_GR.sum(0)
        taken_R = torch.minimum(remaining_R, total_R)
        remaining_R = remaining_R - taken_R
        edges_GR = (counts_GR.cumsum(0) * taken_R + total_R // 2) // total_R.clamp(min=1)
        quota_GR = quota_GR + edges_GR.diff(dim=0, prepend=torch.zeros_like(edges_GR[:1]))
    return quota_GR
