"""LSA: Layer-wise Sparsity Allocation by minimal linear reconstruction error (Yang 2026, ICLR, openreview xq3lza5IjN).

What would it cost each linear to lose half of its weights? Per row, in groups of 128 columns, the weight
whose removal adds least to the exact error `‖(w_P)X‖² = w_P H w_Pᵀ` of the removed set P goes, 64 times:

    cost_j = w_j²·H_jj + 2·w_j·Σ_{i∈P} w_i·H_ij

where P includes what earlier groups lost. The sum of all costs is the linear's error; `e_l` is the mean over
the linears of a block; importance is `1 − e_l/Σe`, mapped to a band of densities of width 2α. α by sparsity
10, 20, …, 80 % is .06 .02 .04 .02 .04 .10 .15 .12 in the paper, linear in between here.

Earlier groups are carried over by one product a group. Within a group a compiled kernel takes a row at a time, its costs
in a few vectors (kernels/greedy.h). Without one, all rows are treated at once, in tiles that stay in the cache:
64 steps a group, each a row-wise argmin, one gathered row of H per row of W and one multiply-add.

Shapes: O = out, I = in, R = rows of a tile, K = columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tawny.allocation.budget import exact
from tawny.allocation.profile import Allocation, Allocator, Linears, Profile, largest
from tawny.allocation.scores import HalfBand, band, half_band
from tawny.calibration.statistics import Needs
from tawny.errors import NumericalError
from tawny.kernels.ops import remove_half

_TILE = 2048  # rows whose scores, weights and scratch (1 MB each) share a core's cache
_GONE = 1e38  # a finite "infinity": an inf would turn into NaN when an update touches it


def half_removal_error(W_OI: Tensor, H_II: Tensor, group: int = 128) -> Tensor:
    """`w_P H w_Pᵀ` of each row (float64 `[out]`) after greedily removing half of every group of its columns."""
    rows, width = W_OI.shape
    W = W_OI.to(torch.float32).contiguous()
    removed = torch.zeros_like(W)  # the weights in P, zero elsewhere
    error_O = torch.zeros(rows, dtype=torch.float64, device=W.device)
    for start in range(0, width, group):
        columns = slice(start, min(start + group, width))
        carried = removed[:, :start] @ H_II[:start, columns]
        H_KK = H_II[columns, columns]
        if remove_half(W[:, columns], H_KK, carried, removed[:, columns], error_O):
            continue
        H_KK = H_KK.contiguous()
        for top in range(0, rows, _TILE):
            tile = slice(top, top + _TILE)
            w_RK = W[tile, columns].contiguous()
            removed[tile, columns], cost_R = _remove_half(w_RK, H_KK, carried[tile])
            error_O[tile] += cost_R
    return error_O


def _remove_half(w_RK: Tensor, H_KK: Tensor, carried_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Half of each row, greedily: the removed weights (zero elsewhere), and what each row paid for it."""
    rows, width = w_RK.shape
    # A row-wise argmin is by far the slowest operation here and a minimum eight times faster. So the column
    # takes the place of the lowest bits of its cost: who is nearer than 2⁻¹⁶ to the minimum may go early.
    low_bits = (1 << (width - 1).bit_length()) - 1
    column_K = torch.arange(width, dtype=torch.int32, device=w_RK.device)
    first_R = torch.arange(0, rows * width, width, device=w_RK.device)
    twice_RK = 2 * w_RK
    cost_RK = w_RK * (w_RK * H_KK.diagonal() + 2 * carried_RK)
    key_RK, H_RK, out_RK = torch.empty_like(w_RK), torch.empty_like(w_RK), torch.empty_like(w_RK)
    paid_SR = w_RK.new_empty(width // 2, rows)
    chosen_SR = torch.empty(width // 2, rows, dtype=torch.int64, device=w_RK.device)
    for chosen_R, paid_R in zip(chosen_SR, paid_SR, strict=True):
        torch.bitwise_and(cost_RK.view(torch.int32), ~low_bits, out=key_RK.view(torch.int32))
        key_RK.view(torch.int32).bitwise_or_(column_K)
        torch.bitwise_and(key_RK.amin(1).view(torch.int32), low_bits, out=chosen_R)
        place_R = first_R + chosen_R
        torch.take(cost_RK, place_R, out=paid_R)
        # cost_j += 2·w_i·w_j·H_ij for the weight i that has just left its row
        torch.index_select(H_KK, 0, chosen_R, out=H_RK)
        torch.mul(twice_RK, w_RK.take(place_R)[:, None], out=out_RK)
        cost_RK.addcmul_(H_RK, out_RK)
        cost_RK.view(-1).index_fill_(0, place_R, _GONE)
    gone_RK = torch.zeros_like(w_RK).scatter_(1, chosen_SR.T, w_RK.gather(1, chosen_SR.T))
    return gone_RK, paid_SR.sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class Lsa(Allocator):
    """Units that lose most by losing half of their weights are pruned most: 1 − e/Σe mapped to a band of width 2α.

    Yang 2026 (openreview xq3lza5IjN). `alpha` unset: the paper's value for the sparsity. `granularity`: one number a block, a stage
    (linears with a common input) or a linear.

    Raises:
        NumericalError: a weight or an input is not finite.
        ValueError: no Hessian was given.
    """

    alpha: HalfBand | None = None
    granularity: Literal["block", "group", "linear"] = "block"
    needs: ClassVar[Needs] = "hessian"
    measures_weights: ClassVar[bool] = True

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Linears that share their input as one weight, and what was removed of it: twice the largest, as gate and up are."""
        return 24 * largest(shapes)

    def measure(self, linears: Linears) -> dict[str, Any]:
        sharing: dict[int, list[str]] = {}
        for name, (W_OI, statistics) in linears.items():
            if statistics is None or statistics.hessian is None:
                raise ValueError(f"{name} came without the Hessian of its inputs, which lsa needs")
            # Above every cost there can be, and not finite if anything is not.
            bound = W_OI.abs().max().double() ** 2 * statistics.hessian.abs().sum(dtype=torch.float64)
            if not bool(bound < _GONE):
                raise NumericalError(
                    f"{name} {tuple(W_OI.shape)} has weights or inputs that are not finite: "
                    "its checkpoint or the calibration is broken"
                )
            sharing.setdefault(id(statistics.hessian), []).append(name)
        errors = dict.fromkeys(linears, 0.0)
        for names in sharing.values():  # linears with one input are rows of one weight: fewer, longer steps
            statistics = linears[names[0]][1]
            assert statistics is not None and statistics.hessian is not None
            W_OI = torch.cat([linears[name][0] for name in names])
            rows_O = half_removal_error(W_OI, statistics.hessian)
            heights = [len(linears[name][0]) for name in names]
            for name, part_O in zip(names, torch.split(rows_O, heights), strict=True):
                errors[name] = float(part_O.sum())
        return {"half_removal_error": errors}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        members: dict[tuple[int, str], list[float]] = {}
        units: dict[str, tuple[int, str]] = {}
        for info in profile.linears:
            part = {"block": "", "group": info.group, "linear": info.name}[self.granularity]
            units[info.name] = (info.block, part)
            error = float(profile.measures[info.block]["half_removal_error"][info.name])
            members.setdefault(units[info.name], []).append(error)
        errors = {unit: sum(values) / len(values) for unit, values in members.items()}
        total = sum(errors.values())
        importance = [1 - error / total if total else 0.0 for error in errors.values()]
        alpha = half_band(target) if self.alpha is None else self.alpha
        extra = dict(zip(errors, band(importance, 2 * alpha), strict=True))
        raw = {name: target - extra[unit] for name, unit in units.items()}
        return exact(raw, profile.sizes, target)
