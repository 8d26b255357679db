"""ALPS: choose the mask and the weights together by ADMM, then refit the survivors.

Meng et al., "ALPS: improved optimization for highly sparse one-shot pruning for large language models",
NeurIPS 2024, 2406.07831. With H and W scaled so that diag(H) = 1, minimise ½‖X(W − B)ᵀ‖² subject to B = D, D
within the pattern. One iteration for a penalty ρ:

    B = (W H − V + ρD)(H + ρI)⁻¹,   T = B + V/ρ,   D = T where the pattern keeps it, else 0,   V ← ρ(T − D)

D and V are the two halves of T, so T and the mask are all the state there is. ρ grows every third
iteration by 1.3, 1.2 or 1.1 as the support changed by > 10 %, > 0.5 % or > 0 of the survivors;
before it has first grown, a small change means that ρ is too large to move anything, and it is divided by 5,
from a fresh start if the support had moved. It ends when the support stands still, or after iteration 30 when
it changes by less than 0.03 %, or at 300. Then masked conjugate gradients (`refit.py`) find the
best values on the support.

What we do differently: an inverse (`inverse.py`) instead of an eigendecomposition, so that an iteration costs one
product of a weight with a square matrix, or two triangular solves where a weight is wide. The product is of what B has
left to go,

    B = W + S,   S = (ρ(D − W) − V)(H + ρI)⁻¹,

the same B, but its rounding shrinks with the step: where the hardware multiplies bfloat16, the factors and S are
bfloat16, several times faster, and find the same support as float32 ones (losses differ in the fourth digit, either
way); and one inverse serves several ρ (powers.py). What is not that product is kept small: D is never stored, it is T
where |T| is above a threshold; and the next threshold is read from a histogram of the values near the last one. So an
iteration is a product between two passes over the weight, in chunks of rows. Compiled kernels do these
(kernels/admm.h); without them, and for other patterns, torch does, on parts that stay in the cache. Scratch memory:
three copies of W, what `Scaled` keeps, and two chunks.

With a grid the mask is found first, as without one. Then the same iteration starts again from the sparse weight, with its
mask kept and D the nearest point of the grid to T (`_rounded`); where nothing is removed that is all there is. Rows are
independent then, and each keeps its best of the last iterates.

Where it is known what the model's output feels of errors (output.py), rows are scaled, too, so that diag(G) = 1. Of its rows
alone that is all: it moves the threshold of a matrix. Of the whole G the objective is tr(Gn(W − B)Hn(W − B)ᵀ), and

    S = (Gn ⊗ Hn + ρI)⁻¹(ρ(D − W) − V)

in the eigenbases of both (eigenbases.py), a diagonal block of G at a time. Nothing else changes but the refit, and that on a
grid all rows of a block keep the same iterate. Where a weight is wider than such a basis, rows find the mask, and the whole refits it.

Promises: the exact budget in every scope and n:m; weights that are already zero go first and stay zero.

Shapes: O = out, I = in, R and C = rows of a chunk, P = rows of a part of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tawny.calibration.output import Factor, OutputFactor, diagonal_blocks
from tawny.calibration.statistics import Needs
from tawny.kernels import admm
from tawny.patterns import NM, Pattern, Scope, Unstructured, keep_mask, removed_count, zeros_first
from tawny.precision import native_dtype
from tawny.solvers.base import Seen, Solution, Solver, Work, energy, input_hessian
from tawny.solvers.eigenbases import WIDEST, Eigenbases
from tawny.solvers.grid import Grid, kept_on_grid
from tawny.solvers.inverse import with_damping
from tawny.solvers.output import DAMP, Damped, damped
from tawny.solvers.powers import (
    CACHED,
    CHUNK,
    ROWS,
    SMALLEST_RHO,
    Scaled,
    parts,
    serving_bytes,
    waiting_bytes,
    wide,
)
from tawny.solvers.refit import refit

_CHECK = 3  # iterations between two looks at the support
_FARTHEST = 0.45  # a threshold that has moved by a larger share is looked for everywhere
_SETTLED, _SETTLED_AFTER = 3e-4, 30
# With a grid ρ grows every sixth step, whatever happens, and is never so large that it needs a third exact inverse.
_GRID_RHO, _GRID_GROWTH, _GRID_STEPS = 0.2, 1.35, 36
_EIGENBASIS = 12.0  # products of as large matrices that it takes as long as
_GRID_CHECK = 6  # steps between two looks at what is lost, in the second half


Steps = Annotated[int, Field(ge=0, lt=2**31, description="a count below 2**31")]


@dataclass(frozen=True)
class Alps(Solver):
    """ADMM finds mask and weights together, then the survivors are refitted; better than sparsegpt, and slower.

    min ‖X(W − Ŵ)‖² s.t. the pattern, Meng et al. 2024 (2406.07831).

    Raises:
        NumericalError: a number is not finite, or the Hessian has no Cholesky factor even with 1000 times the damping.
        ValueError: no Hessian was given.
    """

    damp: Annotated[float, Field(gt=0, le=1e6, description="a positive number up to 1e6, such as 0.01")] = (
        0.01
    )
    rho: Annotated[float, Field(ge=1e-6, le=1e6, description="a number in [1e-6, 1e6], such as 0.1")] = 0.1
    iterations: Steps = 300
    steps: Steps = 4  # of conjugate gradients; the paper's 10 lower the loss by another 0.01 %
    output_damp: Annotated[
        float, Field(ge=1e-6, le=1e6, description="a number in [1e-6, 1e6], such as 0.05")
    ] = DAMP

    needs: ClassVar[Needs] = "hessian"
    default_scope: ClassVar[Scope] = "matrix"
    stand_in: ClassVar[str] = "sparsegpt"  # where many solutions are only compared: a fraction of the time
    output: ClassVar[Factor] = "whole"
    default_output: ClassVar[Factor] = "whole"

    def work(self, out: int, width: int, output: Factor = "none") -> Work:
        """A residual; about 33 iterations, four steps, and what lies between; two inverses with powers, or eleven for all ρ.

        By the whole factor: an eigenbasis of H and of each block of G, and four products an iteration.
        """
        share = _longest(diagonal_blocks(out)) / width  # what a product with G costs beside one with H
        if output == "whole" and width <= WIDEST:
            tall = 2.2 + share + _EIGENBASIS * share**2
            return Work(tall=tall, square=_EIGENBASIS, rounded=70.0 * (1 + share), passes=450.0)
        if output == "whole":
            plain = self.work(out, width)
            return replace(plain, tall=plain.tall + 1 + share, rounded=plain.rounded + self.steps * share)
        if native_dtype() is torch.bfloat16:
            return Work(tall=1.2, square=1.4, rounded=37.0, rounded_square=6.0, passes=280.0)
        if wide(out, width):
            return Work(tall=1.2, square=3.0, rounded=40.0, passes=280.0)
        return Work(tall=1.2, square=8.0, rounded=37.0, passes=280.0)

    def rounding(self, out: int, width: int, output: Factor = "none") -> Work:
        """36 more iterations, in which the grid costs more than a mask does, and looks at what is lost."""
        if output == "whole" and width <= WIDEST:
            share = _longest(diagonal_blocks(out)) / width
            return Work(tall=4 + 3 * share, square=0.0, rounded=72.0 * (1 + share), passes=3000.0)
        if native_dtype() is torch.bfloat16:
            return Work(tall=3.0, square=1.4, rounded=36.0, rounded_square=6.0, passes=2800.0)
        if wide(out, width):
            return Work(tall=3.0, square=1.6, rounded=39.0, passes=2800.0)
        return Work(tall=3.0, square=4.4, rounded=36.0, passes=2800.0)

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        """While the mask is looked for, or while it is refitted and judged, whichever takes more; measured.

        Looked for with three copies of the weight and what was seen of it, two chunks, and squares of inputs. By the whole factor
        with its eigenvectors beside that, while some are found, and a refit that ties rows together.
        """
        size = native_dtype().itemsize
        waiting = waiting_bytes(width)
        searching = 13 * out * width + serving_bytes(width) + 2 * size * max(CHUNK, ROWS * width)
        plain = waiting + max(searching, 28 * out * width + size * width**2)
        if output != "whole":
            return plain
        block = _longest(diagonal_blocks(out))
        return plain + 12 * out * width + size * out * block + 24 * block**2

    def prepare(self, statistics: Seen) -> Scaled:
        """Damp and scale the Hessian and factorise it for the first ρ, with more damping where it is needed."""
        H_II = input_hessian(statistics).to(torch.float32)
        diagonal_I = H_II.diagonal()
        mean = float(diagonal_I.mean()) or 1.0  # a matrix of zeros (an expert that saw no token)

        def attempt(damp: float) -> Scaled | None:
            scale_I = (diagonal_I + damp * mean).clamp(min=1e-6 * mean).sqrt_()
            scaled = Scaled(H_II, scale_I, damp * mean, damp, self.rho)
            return None if scaled.factor(self.rho) is None else scaled

        return with_damping(self.damp, len(H_II), attempt)

    def solved(
        self,
        W_OI: Tensor,
        shared: Scaled,
        pattern: Pattern,
        sparsity: float,
        grid: Grid | None,
        output: OutputFactor | None,
    ) -> Solution:
        factor, bases = damped(output, self.output_damp), None
        if factor is not None and factor.whole and W_OI.shape[1] <= WIDEST:
            bases = Eigenbases(shared, factor)
        solution = self._pruned(W_OI, shared, pattern, sparsity, factor, bases)
        return solution if grid is None else self._rounded(W_OI, shared, solution, grid, bases)

    def _pruned(
        self,
        W_OI: Tensor,
        scaled: Scaled,
        pattern: Pattern,
        sparsity: float,
        factor: Damped | None,
        bases: Eigenbases | None,
    ) -> Solution:
        notes: dict[str, float | int | str] = {"damp": scaled.damp}
        if isinstance(pattern, Unstructured):
            pattern = pattern.with_default(self.default_scope)
        removed = removed_count(W_OI.numel(), sparsity)
        zero_OI = (W_OI == 0).contiguous()
        zeros = int(zero_OI.sum())
        matrix = isinstance(pattern, Unstructured) and pattern.scope == "matrix"
        dense = isinstance(pattern, NM) and pattern.n == pattern.m
        free = dense or (not isinstance(pattern, NM) and removed in (0, W_OI.numel()))
        if free or zeros == W_OI.numel() or (matrix and zeros >= removed):
            keep_OI = keep_mask(zeros_first(W_OI.abs(), W_OI), pattern, removed)
            return Solution(W_OI.masked_fill(~keep_OI, 0.0), keep_OI, notes)
        kind = _ByThreshold if matrix else _ByMask
        support: _ByThreshold | _ByMask = kind(pattern, removed, zero_OI if zeros else None)
        root_O = factor.root_O if factor is not None and (matrix or bases is not None) else None
        T_OI, notes["iterations"], notes["rho"] = self._admm(W_OI, scaled, support, root_O, bases)
        if support.empty:
            support = _ByMask(pattern, removed, support.zero_OI)
            T_OI, notes["iterations"], notes["rho"] = self._admm(W_OI, scaled, support, root_O, bases)
        scaled.forget()  # the refit needs memory of its own
        keep_OI = support.mask(T_OI)
        T_OI /= scaled.scale_I
        if root_O is not None:
            T_OI /= root_O[:, None]
        weight_OI, lost = refit(
            W_OI,
            keep_OI,
            scaled.hessian_II,
            steps=self.steps,
            start=T_OI,
            damp=scaled.damp,
            rounded=True,
            output=factor,
        )
        return Solution(weight_OI, keep_OI, notes, lost)

    def _admm(
        self,
        W_OI: Tensor,
        scaled: Scaled,
        support: _ByThreshold | _ByMask,
        root_O: Tensor | None,
        bases: Eigenbases | None,
    ) -> tuple[Tensor, int, float]:
        """The last T, how many iterations it took and the last ρ."""
        scaled_OI = (W_OI * scaled.scale_I).contiguous()
        if root_O is not None:
            scaled_OI *= root_O[:, None]

        def first() -> Tensor:  # D = the best of W, V = 0
            T_OI = scaled_OI.clone()
            support.choose(T_OI)
            for part in parts(T_OI, CACHED):
                T_OI[part] = support.kept(T_OI[part], part)
            return T_OI

        T_OI = first()
        chunks = _chunks(T_OI, bases)
        inverses = _inverses(scaled, bases, self.rho, chunks)
        scratch = T_OI.new_empty((2, _longest(chunks), T_OI.shape[1]), dtype=scaled.dtype)
        survivors = max(support.changes(T_OI), 1)
        rho = before = self.rho
        grown = False
        iteration = 0
        for iteration in range(1, self.iterations + 1):
            assert inverses is not None  # `prepare` has made the first one's factor
            support.begin(T_OI)
            for chunk, times_inverse in zip(chunks, inverses, strict=True):
                T_CI, W_CI = T_OI[chunk], scaled_OI[chunk]
                right_CI, spare_CI = (spare_CI[: len(T_CI)] for spare_CI in scratch)
                support.right(T_CI, W_CI, chunk, rho, before, right_CI)
                step_CI = times_inverse(right_CI, spare_CI)
                support.update(T_CI, W_CI, step_CI, chunk, rho, before)
            support.finish(T_OI)
            before = rho  # V was made with it
            if iteration % _CHECK:
                continue
            change = support.changes(T_OI) / survivors
            if support.empty:
                break
            factor = 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1 if change > 0 else 1.0
            if grown or change > 0.005:
                if change == 0 or (iteration >= _SETTLED_AFTER and change < _SETTLED):
                    break
                grown = True
                rho *= factor
            else:
                if rho / 5 < SMALLEST_RHO:
                    break
                rho /= 5
                if change > 0:
                    T_OI = first()
                    support.changes(T_OI)
                    before = rho
            inverses = None  # before the next one needs its memory
            inverses = _inverses(scaled, bases, rho, chunks)
            if inverses is None:
                break
        return T_OI, iteration, rho

    def _rounded(
        self, W_OI: Tensor, scaled: Scaled, solution: Solution, grid: Grid, bases: Eigenbases | None
    ) -> Solution:
        """The survivors on a grid: the same iteration on a mask that stays, D being the nearest point of the grid to T.

        Scales follow the iterate: in every step the levels are those nearest by the last scales, and new scales fit them best.
        Nearest and best are by diag(H), as in the scaled weight. Reuses the memory of the solution.
        """
        keep_OI = kept_on_grid(W_OI, solution.mask, grid)
        mask_OI = None if bool(keep_OI.all()) else keep_OI
        root_O1 = W_OI.new_ones(len(W_OI), 1) if bases is None else bases.root_O[:, None]

        def scale(values_PI: Tensor, rows: slice, out_PI: Tensor) -> Tensor:
            torch.mul(values_PI, scaled.scale_I, out=out_PI)
            return out_PI if bases is None else out_PI.mul_(root_O1[rows])

        scaled_OI = scale(W_OI, slice(None), torch.empty_like(W_OI))
        weights_I = scaled.scale_I.square()
        state_OS = grid.fit(solution.weight, weights_I, mask_OI)
        grid_OI = grid.project(solution.weight, state_OS, mask_OI)  # D, unscaled
        T_OI = scale(grid_OI, slice(None), solution.weight)  # whose memory nobody needs any more
        best_OI, best_OS, lost_O = grid_OI.clone(), state_OS.clone(), W_OI.new_full((len(W_OI),), torch.inf)
        chunks = _chunks(T_OI, bases)
        rho = before = max(_GRID_RHO, self.rho)
        inverses = _inverses(scaled, bases, rho, chunks)
        scratch = T_OI.new_empty((2, _longest(chunks), T_OI.shape[1]), dtype=scaled.dtype)
        # Fresh memory for each pass would cost as much as the pass.
        spare = torch.empty_like(T_OI[parts(T_OI, CACHED)[0]])
        for step in range(1, _GRID_STEPS + 1):
            assert inverses is not None  # `prepare` has made a factor for a ρ that is no larger
            for place, chunk in enumerate(chunks):
                right_CI, spare_CI = (spare_CI[: chunk.stop - chunk.start] for spare_CI in scratch)
                for part in parts(right_CI, CACHED):
                    here = _within(chunk, part)
                    T_PI, spare_PI = T_OI[here], spare[: part.stop - part.start]
                    T_PI -= scale(grid_OI[here], here, spare_PI)
                    right_CI[part] = spare_PI.sub_(scaled_OI[here]).mul_(rho).sub_(T_PI, alpha=before)
                step_CI = inverses[place](right_CI, spare_CI)
                for part in parts(right_CI, CACHED):
                    here = _within(chunk, part)
                    T_PI, spare_PI = T_OI[here], spare[: part.stop - part.start]
                    spare_PI.copy_(step_CI[part]).add_(scaled_OI[here])
                    torch.add(spare_PI, T_PI, alpha=before / rho, out=T_PI)
                    torch.div(T_PI, scaled.scale_I, out=spare_PI)
                    if bases is not None:
                        spare_PI /= root_O1[here]
                    _, state_OS[here] = grid.refit(
                        spare_PI,
                        state_OS[here],
                        weights_I,
                        None if mask_OI is None else mask_OI[here],
                        grid_OI[here],
                    )
                if step % _GRID_CHECK == 0 and step > _GRID_STEPS // 2:
                    gone_CI = W_OI[chunk] - grid_OI[chunk]
                    if bases is None:
                        now_C = torch.linalg.vecdot(gone_CI @ scaled.hessian_II, gone_CI)
                    else:
                        now_C = bases.felt(place, gone_CI, scaled.hessian_II).expand(len(gone_CI))
                    better_C = now_C < lost_O[chunk]
                    lost_O[chunk] = torch.where(better_C, now_C, lost_O[chunk])
                    best_OI[chunk] = torch.where(better_C[:, None], grid_OI[chunk], best_OI[chunk])
                    best_OS[chunk][better_C] = state_OS[chunk][better_C]
            before = rho
            if step % _GRID_CHECK == 0 and step < _GRID_STEPS:
                rho *= _GRID_GROWTH
                inverses = None  # before the next one needs its memory
                inverses = _inverses(scaled, bases, rho, chunks)
        scaled.forget()
        if bases is None:
            lost = float(lost_O.sum(dtype=torch.float64))
        else:
            lost = energy(W_OI - best_OI, scaled.hessian_II)
        return Solution(best_OI, keep_OI, solution.notes, lost, best_OS)


def _chunks(T_OI: Tensor, bases: Eigenbases | None) -> list[slice]:
    """The rows that a product takes at once."""
    return parts(T_OI, max(CHUNK, ROWS * T_OI.shape[1])) if bases is None else bases.places


def _longest(chunks: list[slice]) -> int:
    rows: int = max(chunk.stop - chunk.start for chunk in chunks)
    return rows


def _inverses(
    scaled: Scaled, bases: Eigenbases | None, rho: float, chunks: list[slice]
) -> list[Callable[[Tensor, Tensor], Tensor]] | None:
    """What turns each chunk's right side into its step; None where float32 cannot tell."""
    if bases is not None:
        return bases.times_inverse(rho)
    times_inverse = scaled.times_inverse(rho, chunks[-1].stop)
    return None if times_inverse is None else [times_inverse] * len(chunks)


class _Support:
    """Which weights stay, so what D is, and what an iteration does with it. `place` is where some rows lie in T."""

    def __init__(self, pattern: Pattern, removed: int, zero_OI: Tensor | None) -> None:
        self.pattern, self.removed, self.zero_OI = pattern, removed, zero_OI

    @property
    def empty(self) -> bool:
        """Whether nothing stays, although something should."""
        return False

    def mask(self, T_OI: Tensor) -> Tensor:
        """The largest |T|, exactly as many as the budget leaves; what is zero in W goes first."""
        scores_OI = T_OI.abs()
        if self.zero_OI is not None:
            scores_OI.masked_fill_(self.zero_OI, -1.0)
        return keep_mask(scores_OI, self.pattern, self.removed)

    def kept(self, T_RI: Tensor, place: slice) -> Tensor:
        """D: T inside the support, else 0."""
        raise NotImplementedError

    def begin(self, T_OI: Tensor) -> None:
        """An iteration begins."""

    def see(self, T_RI: Tensor, place: slice) -> None:
        """Rows of the new T."""

    def right(
        self, T_RI: Tensor, W_RI: Tensor, place: slice, rho: float, before: float, out_RI: Tensor
    ) -> None:
        """ρ(D − W) − V, with V = before·(T − D)."""
        for part in parts(T_RI, CACHED):
            D_PI = self.kept(T_RI[part], _within(place, part))
            right_PI = torch.mul(W_RI[part], -rho)
            out_RI[part] = right_PI.add_(T_RI[part], alpha=-before).add_(D_PI, alpha=rho + before)

    def update(
        self, T_RI: Tensor, W_RI: Tensor, S_RI: Tensor, place: slice, rho: float, before: float
    ) -> None:
        """T ← W + S + V/ρ, seen."""
        for part in parts(T_RI, CACHED):
            within = _within(place, part)
            gone_PI = T_RI[part].sub_(self.kept(T_RI[part], within))
            torch.add(W_RI[part] + S_RI[part], gone_PI, alpha=before / rho, out=T_RI[part])
            self.see(T_RI[part], within)


def _within(place: slice, part: slice) -> slice:
    return slice(place.start + part.start, place.start + part.stop)


class _ByThreshold(_Support):
    """The support of a matrix: where |T| is above the `removed`-th smallest of it.

    The threshold hardly changes from one iteration to the next, so only values near the last one are ranked, by a
    histogram of their bits: the next one is the largest float of the bin that holds the `removed`-th smallest. A bin is
    2^shift neighbouring floats, a share of 2⁻¹⁴ at most. Values up to the threshold count as removed until the end, when
    `mask` counts them exactly.
    """

    def __init__(self, pattern: Pattern, removed: int, zero_OI: Tensor | None) -> None:
        super().__init__(pattern, removed, zero_OI)
        self.threshold = 0.0
        self._reach = _FARTHEST  # how far, as a share, the next threshold may be from this one
        self._drifts: list[float] = []
        self._seen_OI: Tensor | None = None

    @property
    def empty(self) -> bool:
        """More weights are the largest, all the same, than the budget leaves."""
        return self._seen_OI is not None and not bool(self._seen_OI.any())

    def _scores(self, T_RI: Tensor, place: slice) -> np.ndarray[Any, np.dtype[np.float32]]:
        scores_RI = T_RI.abs()
        if self.zero_OI is not None:
            scores_RI.masked_fill_(self.zero_OI[place], 0.0)
        # numpy compares several times faster than torch does
        scores: np.ndarray[Any, np.dtype[np.float32]] = scores_RI.cpu().numpy()
        return scores

    def _zero(self, place: slice) -> Tensor | None:
        return None if self.zero_OI is None else self.zero_OI[place]

    def choose(self, T_OI: Tensor) -> None:
        """Look at everything."""
        gone_OI = ~self.mask(T_OI)
        if self.zero_OI is not None:
            gone_OI &= ~self.zero_OI
        self.threshold = float(T_OI.abs().mul_(gone_OI).max())
        self._reach, self._drifts = _FARTHEST, [_FARTHEST] * _CHECK

    def kept(self, T_RI: Tensor, place: slice) -> Tensor:
        D_RI = torch.hardshrink(T_RI, self.threshold)
        return D_RI if self.zero_OI is None else D_RI.masked_fill_(self.zero_OI[place], 0.0)

    def begin(self, T_OI: Tensor) -> None:
        self._low, self._high = (_bits(self.threshold * (1 + reach)) for reach in (-self._reach, self._reach))
        self._shift = (max(self._high - self._low - 1, 0) // admm.BINS).bit_length()
        self._counts = admm.histogram(T_OI.numel())

    def see(self, T_RI: Tensor, place: slice) -> None:
        scores = self._scores(T_RI, place)
        above = scores > _float(self._low)
        near = scores[above & (scores <= _float(self._high))].view(np.int32)
        counts = self._counts[0].numpy()
        counts[0] += above.size - int(np.count_nonzero(above))
        np.add.at(counts, 1 + ((near - (self._low + 1)) >> self._shift), 1)

    def right(
        self, T_RI: Tensor, W_RI: Tensor, place: slice, rho: float, before: float, out_RI: Tensor
    ) -> None:
        if not admm.right(T_RI, W_RI, self._zero(place), self.threshold, rho, before, out_RI):
            super().right(T_RI, W_RI, place, rho, before, out_RI)

    def update(
        self, T_RI: Tensor, W_RI: Tensor, S_RI: Tensor, place: slice, rho: float, before: float
    ) -> None:
        zero_RI, bounds = self._zero(place), (_float(self._low), _float(self._high))
        if not admm.update(
            T_RI, W_RI, S_RI, zero_RI, self.threshold, rho, before, bounds, self._shift, self._counts
        ):
            super().update(T_RI, W_RI, S_RI, place, rho, before)

    def finish(self, T_OI: Tensor) -> None:
        totals = self._counts.sum(0).cumsum(0)
        place = int(torch.searchsorted(totals, self.removed))
        if not 1 <= place < len(totals):
            self.choose(T_OI)
            return
        last = self.threshold
        self.threshold = _float(min(self._low + (place << self._shift), self._high))
        drift = abs(self.threshold / last - 1) if last > 0 else _FARTHEST
        # ρ grows every third iteration and the threshold jumps with it, so this is like what was three and six ago
        self._drifts = [*self._drifts[1 - 2 * _CHECK :], drift]
        self._reach = min(_FARTHEST, max(0.03, 2 * max(self._drifts[-_CHECK::-_CHECK])))

    def changes(self, T_OI: Tensor) -> int:
        """How many weights came or went since the last call; in the first one, how many stay."""
        if self._seen_OI is None:
            self._seen_OI = torch.zeros(T_OI.shape, dtype=torch.bool)
        count = admm.changes(T_OI, self.zero_OI, self._seen_OI, self.threshold)
        if count is not None:
            return count
        changed, seen_OI = 0, self._seen_OI.numpy()
        for part in parts(T_OI, CACHED):
            now = self._scores(T_OI[part], part) > self.threshold
            changed += int(np.count_nonzero(now ^ seen_OI[part]))
            seen_OI[part] = now
        return changed


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def _float(bits: int) -> float:
    return float(np.int32(bits).view(np.float32))


class _ByMask(_Support):
    """The support by any pattern: a mask, chosen anew for every T."""

    def __init__(self, pattern: Pattern, removed: int, zero_OI: Tensor | None) -> None:
        super().__init__(pattern, removed, zero_OI)
        self._keep_OI = self._seen_OI = torch.empty(0, dtype=torch.bool)

    def choose(self, T_OI: Tensor) -> None:
        self._keep_OI = self.mask(T_OI)

    def kept(self, T_RI: Tensor, place: slice) -> Tensor:
        return torch.mul(T_RI, self._keep_OI[place])

    def finish(self, T_OI: Tensor) -> None:
        self.choose(T_OI)

    def changes(self, T_OI: Tensor) -> int:
        """How many weights came or went since the last call; in the first one, how many stay."""
        changed_OI = self._keep_OI ^ self._seen_OI if len(self._seen_OI) else self._keep_OI
        self._seen_OI = self._keep_OI
        return int(changed_OI.sum())
