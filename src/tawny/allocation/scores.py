"""Weight scores of a whole block, read without ever holding a second copy of the block.

A block of a 7B model is 200 million scores: too many to concatenate, sort or ship in JSON. A non-negative
float32 orders like its bit pattern, so counting the upper 16 bits gives a histogram with 128 bins an octave,
whose bins are exactly the values bfloat16 can hold; counting the lower 16 bits inside one bin then gives any
order statistic exactly. Both passes see one linear at a time.

Shapes: O = out, I = in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tawny.allocation.profile import Linears
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError

Score = Callable[[Tensor, Statistics | None], Tensor]
BINS = 1 << 16  # sign bit always 0, so half of them stay empty
HalfBand = Annotated[float, Field(ge=0, le=1, description="half the band of sparsities, in [0, 1]")]
_LOW = BINS - 1
_HALF_BANDS = (0.06, 0.02, 0.04, 0.02, 0.04, 0.10, 0.15, 0.12)  # at sparsity 0.1, 0.2, …, 0.8
_PART = 1 << 18  # weights at a time, so that what is made of them stays in a core's cache


def magnitude_scores(W_OI: Tensor, statistics: Statistics | None = None) -> Tensor:
    """`|W_ij|`."""
    return W_OI.to(torch.float32).abs()


def magnitude_parts(W_OI: Tensor) -> Iterator[Tensor]:
    """`|W_ij|` in float32, some rows at a time; each part is the caller's to change."""
    for part in torch.split(W_OI, max(1, _PART // max(1, W_OI.shape[1]))):
        yield part.abs() if part.dtype == torch.float32 else part.to(torch.float32).abs_()


def column_sums(W_OI: Tensor) -> Tensor:
    """`Σ_i |W_ij|` in float32; with the norms it gives the sum of all scores |W_ij|·‖X_j‖."""
    sums_I = torch.zeros(W_OI.shape[1], device=W_OI.device)
    for part in magnitude_parts(W_OI):
        sums_I += part.sum(0)
    return sums_I


def count_above(
    W_OI: Tensor, norms_I: Tensor, thresholds: Sequence[float | Tensor]
) -> tuple[list[int], float]:
    """How many scores |W_ij|·‖X_j‖ are above each threshold, and the highest score (NaN or infinite if any is)."""
    counts, tops = [0] * len(thresholds), [0.0]
    for part in magnitude_parts(W_OI):
        A_RI = part.mul_(norms_I)
        tops.append(float(A_RI.max()) if A_RI.numel() else 0.0)
        for place, threshold in enumerate(thresholds):
            counts[place] += int(torch.count_nonzero(A_RI.gt(threshold)))
    return counts, max(tops, key=lambda top: (not math.isfinite(top), top))


def wanda_scores(W_OI: Tensor, statistics: Statistics | None) -> Tensor:
    """`|W_ij|·‖X_j‖₂` (2306.11695, eq. 1)."""
    if statistics is None:
        raise ValueError("wanda scores need the norms of the inputs, and no statistics were given")
    return W_OI.to(torch.float32).abs() * statistics.squared_norms.to(torch.float32).sqrt()


def score_sets(linears: Linears, score: Score) -> Iterable[tuple[str, Tensor]]:
    """One linear's scores after the other, checked to be finite."""
    for name, (W_OI, statistics) in linears.items():
        scores_OI = score(W_OI, statistics)
        if not bool(torch.isfinite(scores_OI).all()):
            raise NumericalError(
                f"{name} {tuple(W_OI.shape)} has weights or inputs that are not finite: "
                "its checkpoint or the calibration is broken"
            )
        yield name, scores_OI


def _bits(scores: Tensor) -> Tensor:
    # +0.0 turns -0.0 into 0.0, whose bits would otherwise be a negative integer
    return (scores.to(torch.float32) + 0.0).contiguous().view(torch.int32).flatten()


def histogram(scores: Tensor) -> Tensor:
    """How many scores have each pattern of upper 16 bits: int64 `[65536]`, bin b holds the bit patterns b·2¹⁶ …"""
    return torch.bincount(_bits(scores) >> 16, minlength=BINS)


def bin_edges(bins: Tensor) -> Tensor:
    """float32: the lowest score of each of these bins of a histogram."""
    return (bins.to(torch.int32) << 16).view(torch.float32)


def exact_quantile(linears: Linears, score: Score, share: float = 0.5) -> float:
    """The order statistic of rank `⌊share·(n−1)⌋` of all scores together; 0.5 is the (lower) median, as torch's."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for _, scores in score_sets(linears, score):
        counts += histogram(scores).cpu()
    total = int(counts.sum())
    if total == 0:
        raise NumericalError("a block without prunable weights has no median score")
    rank = int(share * (total - 1))
    ends = counts.cumsum(0)
    upper = int(torch.searchsorted(ends, rank, right=True))
    rank -= int(ends[upper] - counts[upper])
    low_counts = torch.zeros(BINS, dtype=torch.int64)
    for _, scores in score_sets(linears, score):
        bits = _bits(scores)
        low_counts += torch.bincount(bits[bits >> 16 == upper].cpu() & _LOW, minlength=BINS)
    lower = int(torch.searchsorted(low_counts.cumsum(0), rank, right=True))
    return float(torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32))


def band(importance: Sequence[float], width: float) -> list[float]:
    """Map importance linearly onto `[0, width]`: the extra density of each unit; equal importances get 0 each.

    The mapping of OWL, DLP and LSA. Differences of rounding noise count as equal.
    """
    low, high = min(importance), max(importance)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return [0.0] * len(importance)
    return [width * (value - low) / (high - low) for value in importance]


def half_band(sparsity: float) -> float:
    """How far units may lie from the target at this sparsity: what LSA found best (openreview xq3lza5IjN), by proportion.

    Outside the range it tried, 10 to 80 %, as large a share of what is legal as at its end. The whole of it takes every
    weight of the last unit, which ruins the model (docs/log/atp-slope.md).
    """
    rare = min(sparsity, 1.0 - sparsity)
    if not 0.1 <= sparsity <= 0.8:
        return rare * (_HALF_BANDS[0] / 0.1 if sparsity < 0.1 else _HALF_BANDS[-1] / 0.2)
    place = min(max(10 * sparsity - 1, 0.0), len(_HALF_BANDS) - 1.0)
    left = min(int(place), len(_HALF_BANDS) - 2)
    return _HALF_BANDS[left] + (place - left) * (_HALF_BANDS[left + 1] - _HALF_BANDS[left])
