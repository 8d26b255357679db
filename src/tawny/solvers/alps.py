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

What we do differently: an inverse, made from a Cholesky factor, instead of an eigendecomposition, so that an iteration
costs one product of a weight with a square matrix. Wide weights keep an inverse while ρ grows by up to 75 % and take two
products instead (`_Divider`). The product is of what B has left to go,

    B = W + (ρ(D − W) − V)(H + ρI)⁻¹,

the same B, but its rounding shrinks with the step: bfloat16 factors, several times faster where the hardware
multiplies them, find the same support as float32 ones (losses differ in the fourth digit, either way). What is not
that product is kept small: D is never stored, it is T where |T| is above a threshold; and the next threshold is read from
a histogram of the values near the last one. So an iteration is a product between two passes over the weight, in chunks of
rows. Compiled kernels do these (packed/kernels/admm.h); without them, and for other patterns, torch does, on parts that
stay in the cache. Scratch memory: three copies of W, three of H, and two chunks.

Promises: the exact budget in every scope and n:m; weights that are already zero go first and stay zero.

Shapes: O = out, I = in, R = rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError, RecipeError
from tawny.packed.kernels import admm
from tawny.patterns import NM, Pattern, Scope, Unstructured, keep_mask, removed_count, zeros_first
from tawny.precision import bfloat16_products
from tawny.solvers.base import Needs, Solution, Work, require_finite
from tawny.solvers.refit import refit

__all__ = ["Alps", "Scaled"]

_RETRIES = 3
_CHUNK = 1 << 22  # weights a product takes at once,
_ROWS = 1024  # or so many rows: every product rounds the whole inverse again
_CACHED = 1 << 16  # weights whose elementwise work stays in a core's cache
_TALL = 0.3  # rows a column from which an inverse pays: products run at twice the speed of triangular solves
_WIDE = 0.75  # rows a column up to which another product costs less than another inverse
_REACH = 0.75  # how much ρ may grow, as a share, while an inverse serves
_CHECK = 3  # iterations between two looks at the support
_FARTHEST = 0.45  # a threshold that has moved by a larger share is looked for everywhere
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
    inverse_II: Tensor | None = None  # of the same, once a tall weight has needed it

    def divider(self, rho: float, rows: int) -> _Divider | None:
        """How to multiply a weight of so many rows by (H' + ρI)⁻¹; None where float32 cannot tell."""
        tall = rows >= _TALL * len(self.scale_I)
        if rho == self.rho:
            if tall and self.inverse_II is None:
                self.inverse_II = torch.cholesky_inverse(self.lower_II)
            return _Divider(rho, None if tall else self.lower_II, self.inverse_II if tall else None)
        lower_II = _factor(self.hessian_II, self.scale_I, self.ridge, rho)
        if lower_II is None:
            return None
        return (
            _Divider(rho, None, torch.cholesky_inverse(lower_II)) if tall else _Divider(rho, lower_II, None)
        )


@dataclass(frozen=True)
class Alps:
    """ADMM finds mask and weights together, then the survivors are refitted; better than sparsegpt, and slower.

    min ‖X(W − Ŵ)‖² s.t. the pattern, Meng et al. 2024 (2406.07831).

    Raises:
        RecipeError: an option is out of range.
        NumericalError: a number is not finite, or the Hessian has no Cholesky factor even with 1000 times the damping.
        ValueError: no Hessian was given.
    """

    damp: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    steps: int = 4  # of conjugate gradients; the paper's 10 lower the loss by another 0.01 %

    needs: ClassVar[Needs] = "hessian"
    default_scope: ClassVar[Scope] = "matrix"
    bytes_per_weight: ClassVar[int] = 44  # measured, what judges the result included
    bytes_per_pair: ClassVar[int] = 10  # of inputs, beside the Hessian
    stand_in: ClassVar[str] = "sparsegpt"  # where many solutions are only compared: a fraction of the time
    # The descent; some factors and inverses; about 33 iterations, half of them with two products, and what lies between these.
    work: ClassVar[Work] = Work(tall=2.0, square=8.0, rounded=49.0, passes=280.0)

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
        support = kind(pattern, removed, zero_OI if zeros else None)
        T_OI, notes["iterations"], notes["rho"] = self._admm(W_OI, scaled, support)
        keep_OI = support.mask(T_OI)
        T_OI /= scaled.scale_I
        weight_OI, lost = refit(
            W_OI,
            keep_OI,
            scaled.hessian_II,
            steps=self.steps,
            start=T_OI,
            damp=scaled.damp,
            rounded=True,
        )
        return Solution(weight_OI, keep_OI, notes, lost)

    def _admm(
        self, W_OI: Tensor, scaled: Scaled, support: _ByThreshold | _ByMask
    ) -> tuple[Tensor, int, float]:
        """The last T, how many iterations it took and the last ρ."""
        scaled_OI = (W_OI * scaled.scale_I).contiguous()

        def first() -> Tensor:  # D = the best of W, V = 0
            T_OI = scaled_OI.clone()
            support.choose(T_OI)
            for part in _parts(T_OI, _CACHED):
                T_OI[part] = support.kept(T_OI[part], part)
            return T_OI

        T_OI = first()
        chunk = _parts(T_OI, max(_CHUNK, _ROWS * T_OI.shape[1]))[0]
        scratch = torch.empty_like(T_OI[chunk]), torch.empty_like(T_OI[chunk])
        divider = scaled.divider(self.rho, len(W_OI))
        survivors = max(support.changes(T_OI), 1)
        rho = before = self.rho
        grown = False
        iteration = 0
        for iteration in range(1, self.iterations + 1):
            assert divider is not None
            _iterate(T_OI, support, scaled_OI, divider, rho, before, scratch)
            before = rho
            if iteration % _CHECK:
                continue
            change = support.changes(T_OI) / survivors
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
                    T_OI = first()
                    support.changes(T_OI)
                    before = rho
            fresh = divider.moved(rho, len(W_OI)) or scaled.divider(rho, len(W_OI))
            if fresh is None:
                break
            divider = fresh
        return T_OI, iteration, rho


def _parts(T_OI: Tensor, size: int) -> list[slice]:
    """Slices of rows of about `size` weights."""
    rows = max(1, size // max(T_OI.shape[1], 1))
    return [slice(top, min(top + rows, len(T_OI))) for top in range(0, len(T_OI), rows)]


def _factor(H_II: Tensor, scale_I: Tensor, ridge: float, rho: float) -> Tensor | None:
    """Lower Cholesky factor of H' + ρI, H' = (H + ridge·I)/(scale scaleᵀ); None if not positive definite."""
    A_II = H_II / scale_I
    A_II /= scale_I[:, None]
    A_II.diagonal().add_(ridge / scale_I.square() + rho)
    lower_II: Tensor
    lower_II, info = torch.linalg.cholesky_ex(A_II)
    return None if int(info) or not bool(torch.isfinite(lower_II.diagonal()).all()) else lower_II


@dataclass(frozen=True)
class _Divider:
    """(A, W) ↦ W + A (H' + (ρ + shift)I)⁻¹, by the inverse for ρ where there is one, else by solving against its factor.

    With X = (H' + ρI)⁻¹ the inverse sought is X(I + shift·X)⁻¹, and shift·X has its eigenvalues between 0 and
    a = shift/ρ. There, of all lines, 8(1 + a − x)/(8 + 8a + a²) is nearest to 1/(1 + x): by Chebyshev's polynomial it is
    off by a²/(8 + 8a + a²) at most, 1 % for a = 0.3 and 4 % for 0.75.
    """

    rho: float
    lower_II: Tensor | None
    inverse_II: Tensor | None
    shift: float = 0.0

    def moved(self, rho: float, rows: int) -> _Divider | None:
        """The same for another ρ, where that is near and costs less than a new inverse."""
        if self.inverse_II is None or rows > _WIDE * len(self.inverse_II):
            return None
        near = self.rho <= rho <= (1 + _REACH) * self.rho
        return replace(self, shift=rho - self.rho) if near else None

    def __call__(self, A_RI: Tensor, W_RI: Tensor, scratch_RI: Tensor) -> Tensor:
        """A and the scratch are written to; one of them is returned."""
        if self.inverse_II is None:
            assert self.lower_II is not None
            return torch.add(W_RI, torch.cholesky_solve(A_RI.T, self.lower_II).T, out=scratch_RI)
        if not self.shift:
            return torch.addmm(W_RI, A_RI, self.inverse_II, out=scratch_RI)
        a = self.shift / self.rho
        scale = 8 / (8 + 8 * a + a * a)
        AX_RI = torch.mm(A_RI, self.inverse_II, out=scratch_RI)
        torch.addmm(W_RI, AX_RI, self.inverse_II, alpha=-scale * self.shift, out=A_RI)
        return A_RI.add_(AX_RI, alpha=scale * (1 + a))


def _iterate(
    T_OI: Tensor,
    support: _ByThreshold | _ByMask,
    W_OI: Tensor,
    divider: _Divider,
    rho: float,
    before: float,
    scratch: tuple[Tensor, Tensor],
) -> None:
    """One ADMM iteration, T in place, and the support of the new T.

    `before` is the ρ that V was made with. The scratch tells how many rows a product takes.
    """
    support.begin(T_OI)
    for chunk in _parts(T_OI, scratch[0].numel()):
        T_CI, W_CI = T_OI[chunk], W_OI[chunk]
        right_CI, B_CI = (spare_CI[: len(T_CI)] for spare_CI in scratch)
        support.right(T_CI, W_CI, chunk, rho, before, right_CI)
        with bfloat16_products():
            B_CI = divider(right_CI, W_CI, B_CI)
        support.update(T_CI, B_CI, chunk, rho, before)
    support.finish(T_OI)


class _Support:
    """Which weights stay, so what D is, and what an iteration does with it. `place` is where some rows lie in T."""

    def __init__(self, pattern: Pattern, removed: int, zero_OI: Tensor | None) -> None:
        self.pattern, self.removed, self.zero_OI = pattern, removed, zero_OI

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
        for part in _parts(T_RI, _CACHED):
            D_PI = self.kept(T_RI[part], _within(place, part))
            torch.mul(W_RI[part], -rho, out=out_RI[part])
            out_RI[part].add_(T_RI[part], alpha=-before).add_(D_PI, alpha=rho + before)

    def update(self, T_RI: Tensor, B_RI: Tensor, place: slice, rho: float, before: float) -> None:
        """T ← B + V/ρ, seen."""
        for part in _parts(T_RI, _CACHED):
            within = _within(place, part)
            gone_PI = T_RI[part].sub_(self.kept(T_RI[part], within))
            torch.add(B_RI[part], gone_PI, alpha=before / rho, out=T_RI[part])
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

    def _scores(self, T_RI: Tensor, place: slice) -> np.ndarray[Any, np.dtype[np.float32]]:
        scores_RI = T_RI.abs()
        if self.zero_OI is not None:
            scores_RI.masked_fill_(self.zero_OI[place], 0.0)
        # numpy compares several times faster than torch does
        made: np.ndarray[Any, np.dtype[np.float32]] = scores_RI.cpu().numpy()
        return made

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

    def update(self, T_RI: Tensor, B_RI: Tensor, place: slice, rho: float, before: float) -> None:
        zero_RI, bounds = self._zero(place), (_float(self._low), _float(self._high))
        if not admm.update(
            T_RI, B_RI, zero_RI, self.threshold, rho, before, bounds, self._shift, self._counts
        ):
            super().update(T_RI, B_RI, place, rho, before)

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
        found = admm.changes(T_OI, self.zero_OI, self._seen_OI, self.threshold)
        if found is not None:
            return found
        changed, seen_OI = 0, self._seen_OI.numpy()
        for part in _parts(T_OI, _CACHED):
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
