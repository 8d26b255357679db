"""Grids with two levels of scales, as GGUF's types have them.

A weight is (d·s)·level − dmin·m: d and dmin are float16 numbers of a block, s and m small integers of a group of its columns
(tawny/gguf_kinds.py). They are chosen from the inside out. For each group alone the best scale c and offset e are looked for
in float32. The largest of a block decide d and dmin. Then s and m are the pair, of those around c/d and e/dmin, that leaves
the smallest error; and d and dmin are least squares for the levels that these give, once more with s and m chosen anew.

The state is `[O, S, 4]`: d, s, dmin and m of each group. Types without s have s = 1, those without a minimum m = 0.

Shapes: O = out, I = in, S = groups, J = columns of a group, B = blocks, N = groups of a block, P = rows of a part.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tawny.gguf_kinds import GGUF_KINDS, GGUFKind, fitting
from tawny.kinds import dividing, solved_kind
from tawny.solvers.grid import Grid, Rounding, ScaledGrid, cached_parts, reciprocal

_ROWS = 4096  # of a large matrix that are rounded at a time
_TRIES = 12  # of scales of a group with a minimum, around the one that spans it
_ROUNDS = 2  # of d and dmin, and s and m by these


@final
@dataclass(frozen=True)
class BlockGrid(Grid):
    """The values of a GGUF type."""

    kind: GGUFKind

    @property
    def group(self) -> int:
        return self.kind.group

    @property
    def block(self) -> int:
        return self.kind.block

    @property
    def zero(self) -> bool:
        return self.kind.zero

    @property
    def _scaled(self) -> ScaledGrid:
        """The grid of a group alone, whose scale may be any number."""
        return ScaledGrid(self.kind.levels, self.group, long=True)

    def fit(self, W_OI: Tensor, weights_I: Tensor | None = None, keep_OI: Tensor | None = None) -> Tensor:
        made = []
        for part in cached_parts(*W_OI.shape):
            keep_PI = None if keep_OI is None else keep_OI[part]
            X_PSJ, w_PSJ = self._cut(W_OI[part]), self._weights(W_OI[part], weights_I, keep_PI)
            c_PS, e_PS = self._alone(W_OI[part], weights_I, keep_PI)
            d_PS, dmin_PS = self._of_block(c_PS, e_PS)
            for _ in range(_ROUNDS):
                s_PS, m_PS = self._steps(X_PSJ, w_PSJ, c_PS, e_PS, d_PS, dmin_PS)
                state_PS = torch.stack([d_PS, s_PS, dmin_PS, m_PS], -1)
                d_PS, dmin_PS = self._least_squares(X_PSJ, w_PSJ, state_PS)
            made.append(torch.stack([d_PS, s_PS, dmin_PS, m_PS], -1))
        return torch.cat(made)

    def renew(
        self, W_OJ: Tensor, state_O: Tensor, weights_J: Tensor, keep_OJ: Tensor | None = None
    ) -> Tensor:
        if self.kind.scales is None:
            return state_O
        made = []
        for part in cached_parts(*W_OJ.shape):
            keep_PJ = None if keep_OJ is None else keep_OJ[part]
            X_PSJ, w_PSJ = self._cut(W_OJ[part]), self._weights(W_OJ[part], weights_J, keep_PJ)
            d_PS, dmin_PS = state_O[part, None, 0], state_O[part, None, 2]
            s_PS, m_PS = self._steps(
                X_PSJ, w_PSJ, *self._alone(W_OJ[part], weights_J, keep_PJ), d_PS, dmin_PS
            )
            made.append(torch.stack([d_PS, s_PS, dmin_PS, m_PS], -1)[:, 0])
        return torch.cat(made)

    def refit(
        self,
        X_OI: Tensor,
        state_OS: Tensor,
        weights_I: Tensor | None,
        keep_OI: Tensor | None,
        out_OI: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        made_OI = torch.empty_like(X_OI) if out_OI is None else out_OI
        new_OS = torch.empty_like(state_OS)
        for part in cached_parts(*X_OI.shape):
            keep_PI = None if keep_OI is None else keep_OI[part]
            X_PSJ, w_PSJ = self._cut(X_OI[part]), self._weights(X_OI[part], weights_I, keep_PI)
            c_PS, e_PS = _scale_and_offset(state_OS[part])
            level_PSJ = self._level(X_PSJ, c_PS, e_PS)
            if self.kind.scales is not None:
                square_PS = (w_PSJ * level_PSJ.square()).sum(-1)
                along_PS = (w_PSJ * level_PSJ * (X_PSJ + e_PS[..., None])).sum(-1)
                c_PS = torch.where(square_PS > 0, along_PS / square_PS, c_PS)
            d_PS, s_PS, dmin_PS, m_PS = state_OS[part].unbind(-1)
            s_PS = self._rounded(c_PS, d_PS) if self.kind.scales else s_PS
            state_PS = torch.stack([d_PS, s_PS, dmin_PS, m_PS], -1)
            d_PS, dmin_PS = self._least_squares(X_PSJ, w_PSJ, state_PS, level_PSJ)
            new_OS[part] = torch.stack([d_PS, s_PS, dmin_PS, m_PS], -1)
            c_PS, e_PS = _scale_and_offset(new_OS[part])
            value_PI = (level_PSJ * c_PS[..., None] - e_PS[..., None]).flatten(1)
            made_OI[part] = (value_PI if keep_PI is None else value_PI * keep_PI).add_(0.0)
        return made_OI, new_OS

    def project(self, W_OI: Tensor, state_OS: Tensor, keep_OI: Tensor | None = None) -> Tensor:
        made_OI = torch.empty_like(W_OI)
        for part in cached_parts(*W_OI.shape):
            c_PS, e_PS = _scale_and_offset(state_OS[part])
            level_PSJ = self._level(self._cut(W_OI[part]), c_PS, e_PS)
            value_PI = level_PSJ.mul_(c_PS[..., None]).sub_(e_PS[..., None]).flatten(1)
            made_OI[part] = (value_PI if keep_OI is None else value_PI.mul_(keep_OI[part])).add_(0.0)
        return made_OI

    def rounding(self, state_O: Tensor) -> Rounding:
        c_O, e_O = _scale_and_offset(state_O)
        by_O = reciprocal(c_O)
        return lambda values: self._nearest((values + e_O).mul_(by_O)).mul_(c_O).sub_(e_O).add_(0.0)

    def encoded(self, W_OI: Tensor, state_OS: Tensor) -> Tensor:
        return self.kind.encode(self.codes(W_OI, state_OS).cpu(), state_OS.cpu())

    def codes(self, W_OI: Tensor, state_OS: Tensor) -> Tensor:
        """uint8 `[out, in]`: the places of the nearest levels."""
        levels, low = torch.tensor(self.kind.levels, dtype=torch.float32), self.kind.levels[0]
        made_OI = torch.empty(W_OI.shape, dtype=torch.uint8)
        for part in cached_parts(*W_OI.shape):
            level_PSJ = self._level(self._cut(W_OI[part]), *_scale_and_offset(state_OS[part]))
            level_PI = level_PSJ.flatten(1)
            places_PI = level_PI.sub_(low) if self._every else torch.bucketize(level_PI, levels)
            made_OI[part] = places_PI.to(torch.uint8)
        return made_OI

    def _cut(self, W_OI: Tensor) -> Tensor:
        return W_OI.reshape(len(W_OI), -1, self.group)

    def _weights(self, like_OI: Tensor, weights_I: Tensor | None, keep_OI: Tensor | None) -> Tensor:
        """[1 or O, S, J]: what a squared error counts."""
        weights = like_OI.new_ones(1, like_OI.shape[1]) if weights_I is None else weights_I[None]
        return self._cut(weights if keep_OI is None else weights * keep_OI)

    @property
    def _every(self) -> bool:
        """Levels are all integers of a range."""
        return self.kind.levels[-1] - self.kind.levels[0] == len(self.kind.levels) - 1

    def _nearest(self, ratio: Tensor) -> Tensor:
        levels = self.kind.levels
        if self._every:
            return ratio.round_().clamp_(levels[0], levels[-1])
        return self._scaled.nearest(ratio)

    def _level(self, X_PSJ: Tensor, c_PS: Tensor, e_PS: Tensor) -> Tensor:
        return self._nearest((X_PSJ + e_PS[..., None]).mul_(reciprocal(c_PS)[..., None]))

    def _alone(self, X_PI: Tensor, weights_I: Tensor | None, keep_PI: Tensor | None) -> tuple[Tensor, Tensor]:
        """[P, S]: the best scale and offset of each group, in float32."""
        if self.kind.minima:
            return self._with_minimum(self._cut(X_PI), self._weights(X_PI, weights_I, keep_PI))
        c_PS = self._scaled.fit(X_PI, weights_I, keep_PI)
        return c_PS, torch.zeros_like(c_PS)

    def _with_minimum(self, X_PSJ: Tensor, w_PSJ: Tensor) -> tuple[Tensor, Tensor]:
        """Levels from scales around the one that spans a group, and least squares of scale and offset for these."""
        last = len(self.kind.levels) - 1
        low_PS = X_PSJ.amin(-1).clamp(max=0) if self.kind.minima > 1 else X_PSJ.amin(-1)
        span_PS = X_PSJ.amax(-1) - low_PS
        Sw, Sx = w_PSJ.sum(-1), (w_PSJ * X_PSJ).sum(-1)
        Sxx = (w_PSJ * X_PSJ.square()).sum(-1)
        best_PS = torch.full_like(span_PS, torch.inf)
        c_PS, e_PS = torch.zeros_like(span_PS), torch.zeros_like(span_PS)
        for i in range(_TRIES):
            by_PS = (last - 0.8 + 0.15 * i) * reciprocal(span_PS)
            q_PSJ = ((X_PSJ - low_PS[..., None]) * by_PS[..., None]).round_().clamp_(0, last)
            wq_PSJ = w_PSJ * q_PSJ
            Sq, Sqq, Sqx = (
                wq_PSJ.sum(-1),
                torch.linalg.vecdot(wq_PSJ, q_PSJ),
                torch.linalg.vecdot(wq_PSJ, X_PSJ),
            )
            determinant = Sw * Sqq - Sq.square()
            scale = (Sw * Sqx - Sx * Sq) / determinant
            off = (Sqq * Sx - Sq * Sqx) / determinant
            if self.kind.minima > 1:  # which only lower
                scale = torch.where(off > 0, Sqx / Sqq, scale)
                off = off.clamp(max=0)
            lost = Sxx + scale.square() * Sqq + off.square() * Sw
            lost = lost - 2 * scale * Sqx - 2 * off * Sx + 2 * scale * off * Sq
            better = (lost < best_PS) & scale.isfinite() & off.isfinite()
            best_PS = torch.where(better, lost, best_PS)
            c_PS, e_PS = torch.where(better, scale, c_PS), torch.where(better, -off, e_PS)
        return c_PS, torch.where(best_PS.isinf(), -low_PS, e_PS)  # all alike: the offset is all

    def _of_block(self, c_PS: Tensor, e_PS: Tensor) -> tuple[Tensor, Tensor]:
        """[P, S]: d and dmin that reach the largest scale and offset of each block."""
        kind, n = self.kind, self.block // self.group
        c_PBN, e_PBN = (each.reshape(len(each), -1, n) for each in (c_PS, e_PS))
        if kind.scales is None:
            return _half(c_PS), _half(e_PS)
        low, high = kind.scales
        place = c_PBN.abs().argmax(-1, keepdim=True)
        largest = c_PBN.gather(-1, place)
        # The longer end of s is the one below 0, where there is one.
        d_PB1 = _half(largest / (low if low < 0 else high))
        dmin_PB1 = _half(e_PBN.amax(-1, keepdim=True) / max(1, kind.minima))
        return d_PB1.expand_as(c_PBN).flatten(1), dmin_PB1.expand_as(e_PBN).flatten(1)

    def _rounded(self, c_PS: Tensor, d_PS: Tensor) -> Tensor:
        assert self.kind.scales is not None
        return (c_PS * reciprocal(d_PS)).round().clamp_(*self.kind.scales)

    def _steps(
        self, X_PSJ: Tensor, w_PSJ: Tensor, c_PS: Tensor, e_PS: Tensor, d_PS: Tensor, dmin_PS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[P, S]: s and m, of those around the given scale and offset the pair with the smallest error."""
        kind = self.kind
        ones = torch.ones_like(d_PS)
        if kind.scales is None:
            return ones, ones * min(1, kind.minima)
        s_PS = (c_PS * reciprocal(d_PS)).floor()
        m_PS = (e_PS * reciprocal(dmin_PS)).floor()
        best_PS, s_best, m_best = torch.full_like(d_PS, torch.inf), ones, ones * 0
        for up_m in (0, 1) if kind.minima else (0,):
            m = (m_PS + up_m).clamp(0, kind.minima)
            for up_s in (0, 1):
                s = (s_PS + up_s).clamp(*kind.scales)
                c, e = d_PS * s, dmin_PS * m
                off_PSJ = self._level(X_PSJ, c, e).mul_(c[..., None]).sub_(e[..., None]).sub_(X_PSJ)
                lost = torch.linalg.vecdot(w_PSJ * off_PSJ, off_PSJ)
                better = lost < best_PS
                best_PS = torch.where(better, lost, best_PS)
                s_best, m_best = torch.where(better, s, s_best), torch.where(better, m, m_best)
        return s_best, m_best

    def _least_squares(
        self, X_PSJ: Tensor, w_PSJ: Tensor, state_PS: Tensor, level_PSJ: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[P, S]: d and dmin of each block for the levels that a state gives."""
        d_PS, s_PS, dmin_PS, m_PS = state_PS.unbind(-1)
        q_PSJ = self._level(X_PSJ, *_scale_and_offset(state_PS)) if level_PSJ is None else level_PSJ
        wq_PSJ = w_PSJ * q_PSJ
        n = self.block // self.group

        def total(each_PS: Tensor) -> Tensor:
            return each_PS.reshape(len(each_PS), -1, n).sum(-1, keepdim=True)

        qq = total(s_PS.square() * torch.linalg.vecdot(wq_PSJ, q_PSJ))
        qx = total(s_PS * torch.linalg.vecdot(wq_PSJ, X_PSJ))
        old_d, old_dmin = (each.reshape(len(each), -1, n)[..., :1] for each in (d_PS, dmin_PS))
        d, dmin = qx / qq, old_dmin
        if self.kind.minima:
            mm = total(m_PS.square() * w_PSJ.sum(-1))
            mx = -total(m_PS * (w_PSJ * X_PSJ).sum(-1))
            qm = total(s_PS * m_PS * wq_PSJ.sum(-1))
            determinant = qq * mm - qm.square()
            both_dmin = (qq * mx + qm * qx) / determinant
            both = determinant > 1e-6 * qq * mm
            if self.kind.minima > 1:  # a minimum that is the only one may have either sign
                both &= both_dmin >= 0
            d = torch.where(both, (mm * qx + qm * mx) / determinant, (qx + old_dmin * qm) / qq)
            dmin = torch.where(both, both_dmin, old_dmin)
        fine = d.isfinite() & dmin.isfinite()
        first = torch.where(fine, _half(d), old_d)
        second = torch.where(fine, _half(dmin), old_dmin)
        return first.expand(-1, -1, n).flatten(1), second.expand(-1, -1, n).flatten(1)


def grid_of(name: str, group: int | None = None, width: int = 0) -> Grid:
    """What a solver rounds to for a kind in a weight of a width, its scales over `group` columns where that is a choice."""
    kind = solved_kind(name, group)
    if isinstance(kind, GGUFKind):
        return BlockGrid(kind)
    span = dividing(width, group) or None if kind.target == "compressed-tensors" else kind.span(group)
    return ScaledGrid(kind.grid, span, kind.long)


def rounded(W_OI: Tensor, name: str, weights_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A weight by best scales in a GGUF type: its values in the dtype that it has, and uint8 `[out, bytes of a row]`."""
    kind = GGUF_KINDS[fitting(name, W_OI.shape[1])]
    grid, made_OI = BlockGrid(kind), torch.empty_like(W_OI)
    rows = torch.empty(len(W_OI), W_OI.shape[1] // kind.block * kind.bytes, dtype=torch.uint8)

    def round_rows(start: int) -> None:
        part = slice(start, start + _ROWS)
        values_PI = W_OI[part].float()
        state = grid.fit(values_PI, weights_I)
        values_PI = grid.project(values_PI, state)
        rows[part], made_OI[part] = grid.encoded(values_PI, state), values_PI.to(W_OI.dtype)

    starts = range(0, len(W_OI), _ROWS)
    threads = torch.get_num_threads()
    if len(starts) == 1 or threads == 1 or W_OI.device.type != "cpu":
        for start in starts:
            round_rows(start)
        return made_OI, rows
    # The tensors of a part are too small to share, so each thread has rows of its own. A new thread has as many as are set now.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(round_rows, starts))
    finally:
        torch.set_num_threads(threads)
    return made_OI, rows


def _half(values: Tensor) -> Tensor:
    """As float16 holds them, within its range."""
    return values.nan_to_num(0.0).clamp(-65504, 65504).half().float()


def _scale_and_offset(state: Tensor) -> tuple[Tensor, Tensor]:
    d, s, dmin, m = state.unbind(-1)
    return d * s, dmin * m
