"""ATP (Huang 2025, ICML, 2502.14770): sparsity rises with depth as an arithmetic progression.

The error of an early block is carried and amplified by all later ones, so early blocks must lose less; the
paper proves the error monotone in the sparsity and finds `s_l = S + β·(l − (L−1)/2)` within 1 % of a Bayesian
search. One number is left to choose, `0 ≤ β ≤ min(2S, 2−2S)/(L−1)`, by a handful of trials on
held-out text.

Without trials (`beta` unset) the progression spans the band of sparsities that LSA found best at that target: ± 0.15
at 70 % (.55 to .85), ± 0.10 at 60 %, ± 0.04 at 50 %, and narrows beyond 80 %: ± 0.06 at 90 %. A fixed share of the legal range does not do: half of it is ± 0.25
at 50 %, and much worse than uniform there (docs/log/atp-slope.md). Blocks of unequal size are centred by parameters, and
depth is counted from the first block that holds linears to the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from tawny.allocation.budget import exact
from tawny.allocation.profile import Allocation, Allocator, Profile
from tawny.allocation.scores import half_band
from tawny.errors import RecipeError


def largest_beta(target: float, blocks: int) -> float:
    """The steepest progression whose ends stay in [0, 1]: `min(2S, 2−2S)/(L−1)`; 0 for one block."""
    return min(2 * target, 2 - 2 * target) / (blocks - 1) if blocks > 1 else 0.0


@dataclass(frozen=True)
class Atp(Allocator):
    """Sparsity rises evenly with depth by beta a block (unset: over a band that depends on the target, ± 0.15 at 70 %).

    Huang 2025 (2502.14770). Needs no data and no weights.

    Raises:
        RecipeError: beta is outside [0, min(2S, 2 − 2S)/(L − 1)] for a sparsity S over L blocks.
    """

    beta: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False, description="a step that is not negative, such as 0.01"),
    ] = None

    def allocate(self, profile: Profile, target: float) -> Allocation:
        first, blocks = profile.span.start, len(profile.span)
        limit = largest_beta(target, blocks)
        band = 2 * half_band(target) / (blocks - 1) if blocks > 1 else 0.0
        beta = min(band, limit) if self.beta is None else self.beta
        # The slack lets a search that steps up to the limit reach it in spite of rounding.
        if beta > limit + 1e-9:
            raise RecipeError(
                f"beta {beta} given, expected a step in [0, {limit:.4g}] for sparsity {target:.4g} over {blocks} blocks"
            )
        raw = {info.name: target + beta * (info.block - first - (blocks - 1) / 2) for info in profile.linears}
        return exact(raw, profile.sizes, target)
