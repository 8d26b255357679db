"""DLP: Dynamic Layerwise Pruning (Chen 2025, ICML, 2505.23807): blocks with large typical scores matter less.

Where OWL counts outliers beyond a multiple of the mean, a constant that must be tuned, DLP takes the median
`m_l` of Wanda's scores of all linears of a block: `I_l = 1 − m_l/Σ_k m_k`; `I` is mapped to a band
of densities of width 2α and centred on the budget. α = 0.15 at 70 % in the paper. The released
code takes the mean instead of the median: `statistic="mean"`.

The median is exact (the lower one for an even number of weights); equal blocks give uniform sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from tawny.allocation.budget import exact
from tawny.allocation.profile import Allocation, Allocator, Linears, Profile, largest
from tawny.allocation.scores import HalfBand, band, exact_quantile, score_sets, wanda_scores
from tawny.calibration.statistics import Needs


@dataclass(frozen=True)
class Dlp(Allocator):
    """Blocks whose median |W|·‖X‖₂ is small keep more: density = 2α·(I − min I)/(max I − min I) + const.

    Chen 2025 (2505.23807), with `I_l = 1 − med(A_l)/Σ med(A)`.

    Raises:
        NumericalError: a weight or an input is not finite.
        ValueError: no column norms were given.
    """

    alpha: HalfBand = 0.15
    statistic: Literal["median", "mean"] = "median"
    needs: ClassVar[Needs] = "norms"
    measures_weights: ClassVar[bool] = True

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """A weight and its scores in float32, their bits twice, and 64-bit bins to count them by; measured."""
        return 28 * largest(shapes)

    def measure(self, linears: Linears) -> dict[str, Any]:
        total, count = 0.0, 0
        if not linears:  # everything in the block is excluded
            return {"median_score": 0.0, "mean_score": 0.0}
        for _, scores_OI in score_sets(linears, wanda_scores):
            total += float(scores_OI.sum(dtype=torch.float64))
            count += scores_OI.numel()
        return {"median_score": exact_quantile(linears, wanda_scores, 0.5), "mean_score": total / count}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        blocks = sorted({linear.block for linear in profile.linears})
        typical = [float(profile.measures[block][f"{self.statistic}_score"]) for block in blocks]
        total = sum(typical)
        importance = [1 - value / total if total else 0.0 for value in typical]
        extra = dict(zip(blocks, band(importance, 2 * self.alpha), strict=True))
        raw = {linear.name: target - extra[linear.block] for linear in profile.linears}
        return exact(raw, profile.sizes, target)
