"""Grids: which values a stored weight can take, and the scales that put a weight on one.

A value is scale · level: `levels` are a few signed integers, and a scale belongs to a row of `group` columns. The best
scale is a minimum over levels that are chosen by the scale itself, min_c Σ w_j (x_j − c·q_j(c))², so some are tried: for a
share f of the one that reaches the group's largest value the nearest levels q, for these the least-squares scale
c = Σwxq/Σwq², which lowers the error by (Σwxq)²/Σwq², and its rounded form by a little less. Scales have a sign, so that
the longer half of an asymmetric table can lie on either side; a group of zeros has scale 0.

Promises: scales are float32 numbers of the bits that their grid says, weights are exactly scale · level where kept and +0
elsewhere.

Shapes: O = out, I = in, S = groups of columns, J = columns of a group (the last one is filled up with zeros of no
weight), P = rows of a part that stays in a core's cache, T = first guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor

from tawny.kernels.fit import fit as kernel
from tawny.kinds import half_steps

Rounding = Callable[[Tensor], Tensor]
_SHARES = [0.55 + 0.5 * i / 7 for i in range(8)]  # of the scale that reaches the largest value
_DWARFS = 48  # times the median of its row
_PART = 1 << 17  # weights whose half a dozen copies stay in a core's cache
ACCIDENTS = 0.01  # share of zeros up to which a weight is one with no zeros


class Grid(Protocol):
    """The interface: what values a stored weight can have, and the state that puts a weight on them.

    A state is a tensor `[O, S, …]` that belongs to the S groups of columns of each row.

    Attributes:
        group: columns of one entry of the state; None: all of a row.
        block: columns whose state is chosen at once, a multiple of `group`.
        zero: whether a weight of 0 stays 0.
    """

    @property
    def group(self) -> int | None: ...

    @property
    def block(self) -> int | None: ...

    @property
    def zero(self) -> bool: ...

    def suiting(self, W_OI: Tensor) -> Grid:
        """The grid of its kind that suits a weight."""
        return self

    def fit(self, W_OI: Tensor, weights_I: Tensor | None = None, keep_OI: Tensor | None = None) -> Tensor:
        """The state with the smallest Σ weights·(W − value)² over what is kept, as far as it is looked for."""
        ...

    def renew(
        self, W_OJ: Tensor, state_O: Tensor, weights_J: Tensor, keep_OJ: Tensor | None = None
    ) -> Tensor:
        """`[O, …]`: for columns of one group that changed, the state that is best beside the rest of their block's."""
        ...

    def refit(
        self,
        X_OI: Tensor,
        state_OS: Tensor,
        weights_I: Tensor | None,
        keep_OI: Tensor | None,
        out_OI: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """X on the grid, levels by the state given and values by its least-squares refit, in `out` if given; and the refitted state."""
        ...

    def project(self, W_OI: Tensor, state_OS: Tensor, keep_OI: Tensor | None = None) -> Tensor:
        """The nearest value on the grid where kept, else +0."""
        ...

    def rounding(self, state_O: Tensor) -> Rounding:
        """What rounds values `[..., O]` of one group to the grid."""
        ...

    def encoded(self, W_OI: Tensor, state_OS: Tensor) -> Tensor | None:
        """uint8 `[O, bytes of a row]`: a weight on the grid as its file holds it; None where packing finds the state again."""
        return None


@final
@dataclass(frozen=True)
class ScaledGrid(Grid):
    """Values scale · level; the state are the scales `[O, S]`.

    Attributes:
        levels: signed integers, ascending.
        group: columns that share a scale; None: all of a row.
        long: scales have the eight significant bits of bfloat16, as those of whole rows have, not five. In groups of 32 these
            take 2 % off the error of int4, and cost as much as groups of 16 do (docs/log/few-bits.md).
    """

    levels: tuple[int, ...]
    group: int | None = None
    long: bool = False

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels {self.levels} do not ascend")

    @property
    def block(self) -> int | None:
        return self.group

    @property
    def zero(self) -> bool:
        return True  # a mask says what is 0

    def split(self, X_OI: Tensor) -> Tensor:
        """[O, S, J]: a row by groups."""
        width = X_OI.shape[-1]
        size = min(self.group or width, width)
        if width % size:
            X_OI = torch.nn.functional.pad(X_OI, (0, -width % size))
        return X_OI.reshape(*X_OI.shape[:-1], X_OI.shape[-1] // size, size)

    def nearest(self, X: Tensor) -> Tensor:
        """The nearest level of each value, float32; of two as near, the upper one."""
        table, low = half_steps(self.levels).to(X.device), 2 * self.levels[0]
        # A scale so small that it has no reciprocal leaves a NaN, which no index must come of.
        places = torch.mul(X, 2).sub_(low).nan_to_num_(0.0).clamp_(0, len(table) - 1)
        return torch.take(table, places.to(torch.int64))

    def suiting(self, W_OI: Tensor) -> ScaledGrid:
        """Itself, with long scales for a weight in which one group dwarfs the others of its row.

        An error of 3 % in the scale of a group whose largest weight is hundreds of times as large as others is as large
        as several of these. And their scales lie too far apart for eight bits (kernels/scales.py).
        """
        if self.lost == 16:
            return self
        ends_OS = largest(W_OI, self).abs()
        # NaN where all are 0, and nothing is larger.
        usual_O = ends_OS.where(ends_OS > 0, torch.nan).nanmedian(1).values
        return replace(self, long=bool((ends_OS.amax(1) > _DWARFS * usual_O).any()))

    @property
    def lost(self) -> int:
        """Bits of a float32 that a scale does without."""
        return 16 if self.long or self.group is None else 19

    def held(self, scales: Tensor) -> Tensor:
        """The nearest scales, float32, of two as near the even one."""
        bits, lost = scales.contiguous().view(torch.int32), self.lost
        return (bits + ((bits >> lost & 1) + (1 << lost - 1) - 1) >> lost << lost).view(torch.float32)

    def fit(self, W_OI: Tensor, weights_I: Tensor | None = None, keep_OI: Tensor | None = None) -> Tensor:
        low, high = self.levels[0], self.levels[-1]
        ends = [end for end in (high, low) if end and (end == high or low != -high)]
        tried = [share / end for end in ends for share in _SHARES]
        pieces = []
        for part in cached_parts(*W_OI.shape):
            keep_PI = None if keep_OI is None else keep_OI[part].contiguous()  # as the kernel takes it
            X_PI = W_OI[part].contiguous()
            largest_PS = largest(X_PI if keep_PI is None else X_PI * keep_PI, self)
            fits = [_fit(X_PI, largest_PS * share, self, weights_I, keep_PI) for share in tried]
            fitted_TPS, saved_TPS = (torch.stack(each) for each in zip(*fits, strict=True))
            held_TPS = self.held(fitted_TPS)
            off_TPS = held_TPS * reciprocal(fitted_TPS) - 1
            most_PS, best_PS = (
                (saved_TPS * (1 - off_TPS.square())).nan_to_num_(0.0).max(0)
            )  # by the rounded scales
            best_PS = held_TPS.gather(0, best_PS[None])[0]
            pieces.append(torch.where(most_PS > 0, best_PS, 0.0))
        return torch.cat(pieces)

    def renew(
        self, W_OJ: Tensor, state_O: Tensor, weights_J: Tensor, keep_OJ: Tensor | None = None
    ) -> Tensor:
        return state_O  # a group is a block of its own, whose state has just been chosen

    def refit(
        self,
        X_OI: Tensor,
        state_OS: Tensor,
        weights_I: Tensor | None,
        keep_OI: Tensor | None,
        out_OI: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        made_OI = torch.empty_like(X_OI) if out_OI is None else out_OI
        fitted_OS, _ = _fit(X_OI, state_OS, self, weights_I, keep_OI, made_OI)
        return made_OI, fitted_OS

    def project(self, W_OI: Tensor, state_OS: Tensor, keep_OI: Tensor | None = None) -> Tensor:
        W_OI = W_OI.contiguous()
        made_OI = torch.empty_like(W_OI)
        for part in cached_parts(*W_OI.shape):
            keep_PI = None if keep_OI is None else keep_OI[part]
            _fit(W_OI[part], state_OS[part], self, None, keep_PI, made_OI[part], fixed=True)
        return made_OI

    def rounding(self, state_O: Tensor) -> Rounding:
        by_O = reciprocal(state_O)
        return lambda values: self.nearest(values * by_O).mul_(state_O).add_(0.0)  # +0 mends what is −0


def _fit(
    X_OI: Tensor,
    scales_OS: Tensor,
    grid: ScaledGrid,
    weights_I: Tensor | None,
    keep_OI: Tensor | None,
    made_OI: Tensor | None = None,
    fixed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The least-squares scales [O, S] for the levels nearest to X by given scales, and the squares that they save.

    `made_OI`, if given, becomes X on the grid: with the new scales as the grid holds them, or with the given ones if `fixed`.
    """
    scales_OS = scales_OS.contiguous()
    group = min(grid.group or X_OI.shape[1], X_OI.shape[1])
    fitted = kernel(
        X_OI, scales_OS, grid.levels, group, weights_I, keep_OI, made_OI, None if fixed else grid.lost
    )
    if fitted is not None:
        return (grid.held(fitted[0]), fitted[1]) if made_OI is not None and not fixed else fitted
    weights_OSJ = _weights(X_OI, weights_I, keep_OI, grid)
    X_OSJ = grid.split(X_OI)
    levels_OSJ = grid.nearest(X_OSJ * reciprocal(scales_OS)[..., None])
    weighed_OSJ = levels_OSJ * weights_OSJ
    along_OS, square_OS = (
        torch.linalg.vecdot(weighed_OSJ, X_OSJ),
        torch.linalg.vecdot(weighed_OSJ, levels_OSJ),
    )
    fitted_OS = torch.where(square_OS > 0, along_OS / square_OS, 0.0)
    saved_OS = along_OS * fitted_OS
    if made_OI is not None:
        fitted_OS = scales_OS if fixed else grid.held(fitted_OS)
        flat_OI = (levels_OSJ * fitted_OS[..., None]).flatten(1)[:, : X_OI.shape[1]]
        made_OI.copy_(flat_OI if keep_OI is None else flat_OI * keep_OI).add_(0.0)  # +0 mends what is −0
    return fitted_OS, saved_OS


def reciprocal(scales: Tensor) -> Tensor:
    """1 of a scale of 0, by which nothing is divided."""
    return torch.where(scales == 0, 1.0, scales.reciprocal())


def _weights(like_OI: Tensor, weights_I: Tensor | None, keep_OI: Tensor | None, grid: ScaledGrid) -> Tensor:
    """[1 or O, S, J]: what a squared error of each value counts; what is not kept, and what fills up, nothing."""
    weights = torch.ones_like(like_OI[:1]) if weights_I is None else weights_I.to(like_OI.dtype)[None]
    return grid.split(weights if keep_OI is None else weights * keep_OI)


def cached_parts(rows: int, width: int) -> Iterator[slice]:
    """Rows whose half a dozen copies stay in a core's cache."""
    step = max(1, _PART // max(width, 1))
    return (slice(top, top + step) for top in range(0, rows, step))


def largest(X_OI: Tensor, grid: ScaledGrid) -> Tensor:
    """[O, S]: of each group the value of the largest magnitude, with its sign."""
    X_OSJ = grid.split(X_OI)
    return X_OSJ.gather(-1, X_OSJ.abs().argmax(-1, keepdim=True)).squeeze(-1)


def kept_on_grid(W_OI: Tensor, keep_OI: Tensor, grid: Grid) -> Tensor:
    """The mask, less the zeros of W where they are meant: a few are accidents, and rounded as other weights are.

    A grid that cannot hold zeros rounds all of them.
    """
    if not grid.zero:
        return torch.ones_like(keep_OI)
    zeros_OI = keep_OI & (W_OI == 0)
    return keep_OI & ~zeros_OI if int(zeros_OI.sum()) > ACCIDENTS * W_OI.numel() else keep_OI
