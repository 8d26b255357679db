"""SparseGPT: remove column by column, and let the columns to the right make up for what was lost.

Frantar & Alistarh, "SparseGPT: massive language models can be accurately pruned in one shot", 2301.00774.

The paper inverts H and walks the upper Cholesky factor U of H⁻¹ = UᵀU. We walk the same path for half of the
factor's work: write H = R Rᵀ with R *upper* triangular (the Cholesky factor of H read from its last corner).
Then U = R⁻¹, and the squared output error ‖X(W − Ŵ)ᵀ‖² = ‖(W − Ŵ)R‖² falls apart into one term a column. When
the turn of a group J of columns comes, the groups before it (P) have lost δ = w − ŵ, and the values of the group
that make all its terms vanish are

    V_J = W_J + δ_P R_PJ R_JJ⁻¹ = W_J + δ_P R_PJ U_JJ ,

one product with all that lies left, and one with a small triangle. Inside the group it is the paper's sweep:
a removed v_j costs v_j²/U_jj², its score, and moves the columns to its right by −(v_j/U_jj)·U_j,j+1: . So of H⁻¹
only the triangles U_JJ are ever computed, and a column of W is read and written once.

Promises: the budget is exact (the rounding remainder is carried from group to group); the mask of n:m is
chosen from weights that are already updated; inputs that never fire lose their weights first, smallest
magnitude first, and are never allowed to influence others; a weight that was zero stays zero; a Hessian that cannot be factorised gets ten times
the damping, three times, and then is an error, never an identity.

Shapes: O = out, I = in, J = the columns of one group; tensors `_IO` hold a column of W in each row,
contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tawny.calibration.output import Factor, OutputFactor
from tawny.calibration.statistics import Needs
from tawny.errors import check_option
from tawny.patterns import (
    NM,
    Pattern,
    Scope,
    Unstructured,
    keep_mask,
    keep_mask_rows,
    removed_count,
    rows_removed,
    zeros_first,
)
from tawny.solvers.base import Columns, Damp, Seen, Solution, Solver, input_hessian, require_finite
from tawny.solvers.grid import Grid, Rounding, kept_on_grid
from tawny.solvers.inverse import with_damping
from tawny.solvers.output import row_roots

_PANEL = 128  # rows of Rᵀ that are factorised at a time
_DIGITS = 1e-3  # an error that is a smaller part of the damped one is not worth taking from it
_STEP = 16  # columns that are corrected by matrix-vector products before the next matrix-matrix product


@dataclass(frozen=True)
class Swept:
    """What a sweep needs of a Hessian; shared by the linears that share their input."""

    RT_II: Tensor  # Rᵀ; only its lower triangle means anything
    diagonal_I: Tensor  # R_jj = 1/U_jj
    added_I: Tensor  # what was added to the diagonal of H
    dead_I: Tensor  # bool, inputs that were zero for every token
    any_dead: bool
    damp: float  # the damping that was needed


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Column by column, with the error spread over the columns that follow; faster than alps.

    Score w²/U_jj² over groups of columns, H⁻¹ = UᵀU and H = XᵀX + damp·mean(diag)·I, Frantar 2023 (2301.00774).

    Raises:
        NumericalError: a number is not finite, or the Hessian has no Cholesky factor even with 1000 times the damping.
        ValueError: no Hessian was given.
    """

    damp: Damp = 0.01
    group: Columns = 128

    needs: ClassVar[Needs] = "hessian"
    default_scope: ClassVar[Scope] = "matrix"
    output: ClassVar[Factor] = "rows"

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        return 29 * out * width + 4 * width * width  # measured, what judges the result included

    def check_grid(self, pattern: Pattern, grid: Grid, width: int) -> None:
        """Each m weights lie within the columns of one scale: these are rounded as one group. A scale a row has no such end."""
        if isinstance(pattern, NM) and grid.group is not None:
            columns = min(grid.group, width)
            whole = f"an m that divides {columns}, the columns that share a scale"
            check_option(columns % pattern.m == 0, "pattern", f"{pattern.n}:{pattern.m}", whole)

    def prepare(self, statistics: Seen) -> Swept:
        """Factorise the damped Hessian, with more damping where it is needed."""
        hessian_II = input_hessian(statistics)
        energy_I = hessian_II.diagonal().float()
        dead_I = energy_I <= 0
        # A matrix of zeros (an expert that saw no token) still needs a diagonal; any value serves.
        mean = float(energy_I.mean()) or 1.0

        def attempt(damp: float) -> Swept | None:
            H_II = hessian_II.to(torch.float32, copy=True)
            added_I = torch.full_like(energy_I, damp * mean).add_(dead_I, alpha=mean)
            H_II.diagonal().add_(added_I)
            RT_II = _factorise(H_II)
            if RT_II is None:
                return None
            return Swept(RT_II, RT_II.diagonal().clone(), added_I, dead_I, bool(dead_I.any()), damp)

        return with_damping(self.damp, len(hessian_II), attempt)

    def solved(
        self,
        W_OI: Tensor,
        shared: Swept,
        pattern: Pattern,
        sparsity: float,
        grid: Grid | None,
        output: OutputFactor | None,
    ) -> Solution:
        notes: dict[str, float | int | str] = {"damp": shared.damp, "dead_inputs": int(shared.dead_I.sum())}
        columns = self.group if grid is None or grid.block is None else min(grid.block, W_OI.shape[1])
        if grid is not None:
            self.check_grid(pattern, grid, W_OI.shape[1])
        root_O = row_roots(output, pattern, self.default_scope)
        if isinstance(pattern, NM):
            quota = None
        else:
            pattern = pattern.with_default(self.default_scope)
            removed = removed_count(W_OI.numel(), sparsity)
            if removed == 0 and grid is None:
                return Solution(W_OI.clone(), torch.ones_like(W_OI, dtype=torch.bool), notes, 0.0)
            quota = _quotas(W_OI, shared.dead_I, pattern, removed, columns)
        swept = self._sweep(W_OI, shared, pattern, quota, root_O, columns, grid)
        weight_OI, keep_OI, lost, state_OS = swept
        require_finite(weight_OI, "pruned weight")
        return Solution(weight_OI, keep_OI, notes, lost, state_OS)

    def _sweep(
        self,
        W_OI: Tensor,
        factor: Swept,
        pattern: Pattern,
        quota: Tensor | None,
        root_O: Tensor | None,
        group: int,
        grid: Grid | None,
    ) -> tuple[Tensor, Tensor, float | None, Tensor | None]:
        """Walk the columns once; `quota` [groups, rows or 1] is what each group removes, None for n:m.

        Scores of the whole matrix are weighed by `root_O`: as if each row of W was scaled before the sweep, and back after it.

        With a grid, what stays is rounded when its turn comes, and its error is spread like that of what goes; with nothing
        to remove this is GPTQ (2210.17323). Scales are chosen when the first of their columns is reached, with columns
        counting as they will in the error: (v − ŵ)²/U_jj².

        The third result is ‖X(W − Ŵ)ᵀ‖²: the terms of the damped error, less what damping added to it. It is None
        where that leaves too few digits.
        """
        width = W_OI.shape[1]
        step = _STEP
        if isinstance(pattern, NM):
            group, step = max(group // pattern.m, 1) * pattern.m, pattern.m
        has_zeros = int(torch.count_nonzero(W_OI)) < W_OI.numel()
        stay_OI = torch.ones_like(W_OI, dtype=torch.bool)
        if grid is not None:
            stay_OI = kept_on_grid(W_OI, stay_OI, grid) if quota is not None else W_OI != 0
            if grid.group != grid.block:  # each group's state is renewed when its columns are reached
                step = grid.group or step
        weight_OI = torch.empty_like(W_OI)
        keep_OI = torch.empty(W_OI.shape, dtype=torch.bool, device=W_OI.device)
        lost_IO = W_OI.new_empty(width, len(W_OI))  # w − ŵ
        states: list[Tensor] = []
        roundings: list[Rounding] = []
        bench = _Bench(min(group, width), step, W_OI)
        damped, added = 0.0, 0.0
        for start in range(0, width, group):
            stop = min(start + group, width)
            if stop - start < bench.size:
                bench = _Bench(stop - start, step, W_OI)
            RT_JI = factor.RT_II[start:stop]
            bench.load(W_OI[:, start:stop], RT_JI[:, start:stop])
            bench.update(RT_JI[:, :start], lost_IO[:start])
            if quota is not None:
                scores_JO = _scores(bench.V_JO, bench.W_JO if has_zeros else None, factor, start, root_O)
                bench.keep(slice(None), _choose(scores_JO, quota[start // group]))
            if grid is not None:
                if quota is None:  # a first guess at the mask; the true one comes with each m columns
                    scores_JO = _scores(bench.V_JO, bench.W_JO if has_zeros else None, factor, start)
                    bench.keep(slice(None), keep_mask(scores_JO.t().contiguous(), pattern, 0).t())
                stay_OJ = stay_OI[:, start:stop] & bench.kept_JO.t()
                bench.keep(slice(None), stay_OJ.t())
                weights_J = factor.diagonal_I[start:stop].square()
                if grid.block is not None:
                    states.append(grid.fit(bench.V_JO.t().contiguous(), weights_J, stay_OJ))
                elif not states:
                    states.append(grid.fit(W_OI, factor.diagonal_I.square(), stay_OI))
                roundings = [grid.rounding(states[-1][:, 0])] * len(bench.steps)
            for number, (left, part) in enumerate(bench.steps):
                if left:
                    part.V_JO.addmm_(part.ratios_JI, part.gone_IO)
                if grid is not None and grid.group != grid.block:
                    state_O, here = states[-1][:, number], slice(left, left + step)
                    if left:
                        V_OJ = part.V_JO.t().contiguous()
                        state_O.copy_(grid.renew(V_OJ, state_O, weights_J[here], stay_OJ[:, here]))
                    roundings[number] = grid.rounding(state_O)
                if quota is None:
                    scores_JO = _scores(part.V_JO, part.W_JO if has_zeros else None, factor, start + left)
                    keep_OJ = keep_mask(scores_JO.t().contiguous(), pattern, 0)
                    bench.keep(slice(left, left + step), keep_OJ.t())
                    if has_zeros:  # where a group of m has zeros to spare, those that stay must not grow back
                        part.removed_JO.masked_fill_(part.W_JO == 0, 1.0)
                part.walk(roundings[number] if roundings else None)
            here = slice(start, stop)
            damped += _weighted(bench.gone_JO, factor.diagonal_I[here].square())
            bench.store(weight_OI[:, here], keep_OI[:, here], lost_IO[here], roundings)
            added += _weighted(lost_IO[here], factor.added_I[here])
        lost = damped - added
        keep_OI &= stay_OI
        known = lost if lost >= _DIGITS * damped else None
        return weight_OI, keep_OI, known, torch.cat(states, 1) if states else None


class _Bench:
    """The buffers of one group of columns, and every view its loops need, made once.

    Making a view costs as much as the arithmetic on one column of a small model, and there are five a column.
    Columns of W are transposed through a contiguous copy, which torch does several times faster than directly.
    """

    def __init__(self, size: int, step: int, like: Tensor) -> None:
        self.size = size
        self.W_JO, self.V_JO, self.gone_JO, self.removed_JO = (
            like.new_empty(size, len(like)) for _ in range(4)
        )
        self.ratios_JJ = like.new_empty(size, size)  # [j, i] = −U_ij/U_ii
        self.kept_JO = torch.empty(self.W_JO.shape, dtype=torch.bool, device=like.device)
        self._identity_JJ = torch.eye(size, dtype=like.dtype, device=like.device)
        self.steps = [(left, _Step(self, left, min(left + step, size))) for left in range(0, size, step)]

    def load(self, W_OJ: Tensor, RT_JJ: Tensor) -> None:
        self.W_JO.copy_(W_OJ.contiguous().t())
        self._UT_JJ = torch.linalg.solve_triangular(RT_JJ, self._identity_JJ, upper=False)
        torch.div(self._UT_JJ, self._UT_JJ.diagonal().neg(), out=self.ratios_JJ)

    def update(self, RT_JP: Tensor, lost_PO: Tensor) -> None:
        """V_J = W_J + δ_P R_PJ U_JJ, transposed."""
        if len(lost_PO):
            debt_JO = torch.mm(RT_JP, lost_PO, out=self.gone_JO)
            torch.addmm(self.W_JO, self._UT_JJ, debt_JO, out=self.V_JO)
        else:
            self.V_JO.copy_(self.W_JO)

    def keep(self, columns: slice, keep_JO: Tensor) -> None:
        self.kept_JO[columns] = keep_JO
        torch.logical_not(self.kept_JO[columns], out=self.removed_JO[columns])

    def store(
        self, weight_OJ: Tensor, keep_OJ: Tensor, lost_JO: Tensor, roundings: Sequence[Rounding]
    ) -> None:
        # v − v is +0, where v·0 could be −0; and a difference is vectorised, where a masked fill is not.
        # v − (v − q) may not be q.
        if roundings:
            rounded = [nearest(part.V_JO) for nearest, (_, part) in zip(roundings, self.steps, strict=True)]
            pruned_JO = torch.cat(rounded).masked_fill_(self.removed_JO > 0, 0.0)
        else:
            pruned_JO = self.V_JO.sub_(self.gone_JO)
        torch.sub(self.W_JO, pruned_JO, out=lost_JO)
        weight_OJ.copy_(pruned_JO.t().contiguous())
        keep_OJ.copy_(self.kept_JO.t().contiguous())


class _Step:
    """A few columns of a group: corrected together for what is left of them, then one by one for each other."""

    def __init__(self, bench: _Bench, left: int, right: int) -> None:
        here, before = slice(left, right), slice(0, left)
        self.W_JO, self.V_JO, self.removed_JO = bench.W_JO[here], bench.V_JO[here], bench.removed_JO[here]
        self.ratios_JI, self.gone_IO = bench.ratios_JJ[here, before], bench.gone_JO[before]
        rows = (t.unbind(0) for t in (self.V_JO, self.removed_JO, bench.gone_JO[here]))
        gone = [bench.gone_JO[left:j].t() for j in range(left, right)]
        ratios = [bench.ratios_JJ[j, left:j] for j in range(left, right)]
        self._columns = list(zip(*rows, gone, ratios, strict=True))

    def walk(self, nearest: Rounding | None) -> None:
        """v_j −= Σ gone_i·U_ij/U_ii over the step's earlier columns; gone_j is v_j where removed, else what rounding takes."""
        for j, (v_O, removed_O, gone_O, gone_OI, ratios_I) in enumerate(self._columns):
            if j:
                v_O.addmv_(gone_OI, ratios_I)
            if nearest is None:
                torch.mul(v_O, removed_O, out=gone_O)
            else:
                torch.where(removed_O > 0, v_O, v_O - nearest(v_O), out=gone_O)


def _weighted(values_JO: Tensor, weights_J: Tensor) -> float:
    """Σ_j weights_j·‖values_j‖²."""
    return float(torch.linalg.vector_norm(values_JO, dim=1).double().square() @ weights_J.double())


def _factorise(H_II: Tensor) -> Tensor | None:
    """Rᵀ (its lower part) with H = R Rᵀ, R upper, in place; None where H is not positive definite.

    A Cholesky factorisation from the last corner to the first, a panel of rows of Rᵀ at a time, so that nearly all
    of it is one matrix product a panel, without a copy. Narrow matrices are one panel.
    """
    size = _PANEL if len(H_II) > 8 * _PANEL else len(H_II)
    for start in reversed(range(0, len(H_II), size)):
        stop = min(start + size, len(H_II))
        H_II[start:stop, :stop].addmm_(H_II[stop:, start:stop].t(), H_II[stop:, :stop], alpha=-1)
        lower_JJ, info = torch.linalg.cholesky_ex(H_II[start:stop, start:stop].flip(0, 1))
        if int(info) or not torch.isfinite(lower_JJ.sum()):
            return None
        RT_JJ = lower_JJ.t().flip(0, 1)
        H_II[start:stop, start:stop] = RT_JJ
        if start:
            identity_JJ = torch.eye(stop - start, dtype=H_II.dtype, device=H_II.device)
            UT_JJ = torch.linalg.solve_triangular(RT_JJ, identity_JJ, upper=False)
            H_II[start:stop, :start] = UT_JJ.t() @ H_II[start:stop, :start]
    return H_II


def _scores(
    V_JO: Tensor, W_JO: Tensor | None, factor: Swept, start: int, root_O: Tensor | None = None
) -> Tensor:
    """|v|/U_jj, weighed by `root_O`; below every live score the weights of dead inputs by magnitude, and below these the zeros of W."""
    here = slice(start, start + len(V_JO))
    scores_JO = V_JO.abs().mul_(factor.diagonal_I[here, None])
    if root_O is not None:
        scores_JO.mul_(root_O)
    if factor.any_dead:
        dead_J = factor.dead_I[here]
        size_JO = V_JO[dead_J].abs()
        scores_JO[dead_J] = -1 / (size_JO if root_O is None else size_JO.mul_(root_O))
    return scores_JO if W_JO is None else zeros_first(scores_JO, W_JO)


def _choose(scores_JO: Tensor, quota: Tensor) -> Tensor:
    """The group's mask [J, O], its quota being one number (ties: column by column) or one a row."""
    if len(quota) == 1:
        return keep_mask(scores_JO, Unstructured("matrix"), int(quota))
    return keep_mask_rows(scores_JO.t().contiguous(), quota).t()


def _quotas(W_OI: Tensor, dead_I: Tensor, pattern: Unstructured, removed: int, group: int) -> Tensor:
    """[groups, 1 or out] int64: how many weights each group of columns removes; the sum is exact.

    Zeros go first, then weights of dead inputs, then the live ones in equal shares; what rounding leaves is
    carried on to the next group.
    """
    by_row = pattern.scope == "row"

    def count(part_OJ: Tensor) -> Tensor:
        return torch.count_nonzero(part_OJ, dim=1) if by_row else torch.count_nonzero(part_OJ).reshape(1)

    parts = list(zip(torch.split(W_OI, group, dim=1), torch.split(dead_I, group), strict=True))
    sizes = [part_OJ.shape[1] if by_row else part_OJ.numel() for part_OJ, _ in parts]
    nonzero_GR = torch.stack([count(part_OJ) for part_OJ, _ in parts]).cpu()
    dead_GR = torch.stack([count(part_OJ[:, dead_J]) for part_OJ, dead_J in parts]).cpu()
    zero_GR = torch.tensor(sizes)[:, None] - nonzero_GR
    remaining_R = rows_removed(len(W_OI), removed) if by_row else torch.tensor([removed])
    quota_GR = torch.zeros_like(zero_GR)
    for tier_GR in (zero_GR, dead_GR, nonzero_GR - dead_GR):
        total_R = tier_GR.sum(0)
        taken_R = torch.minimum(remaining_R, total_R)
        remaining_R = remaining_R - taken_R
        edges_GR = (tier_GR.cumsum(0) * taken_R + total_R // 2) // total_R.clamp(min=1)
        quota_GR += edges_GR.diff(dim=0, prepend=torch.zeros_like(edges_GR[:1]))
    return quota_GR
