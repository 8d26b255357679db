"""The outlier distribution before and after, on statistics that are at hand while a block is pruned.

A weight is an outlier when |W|·‖X‖ is above M times the block's mean (OWL, 2310.05175, section 3). Solvers that look
at inputs leave column norms behind, so counting once with the dense and once with the pruned weights costs two more
reads of a block and no forward. Both counts see the same inputs: those that reach the block after the already pruned
blocks, which is where they differ from a profile of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from tawny.allocation.scores import column_sums, count_above
from tawny.calibration.statistics import Statistics
from tawny.model.linears import Linear


def count_outliers(
    weights: Mapping[str, Callable[[], Tensor]], norms: Mapping[str, Tensor], M: float
) -> dict[str, int]:
    """How many scores of each linear are above `M` times the mean score of all of them together.

    Args:
        weights: give `[out, in]` of every linear of one block, in any float dtype; a part at a time is made float32.
        norms: `[in]`, ‖X_j‖₂ of each linear's inputs; a common factor does not matter.
    """
    sizes, total = 0, 0.0
    for name, weight in weights.items():
        W_OI = weight()
        sizes += W_OI.numel()
        total += float(column_sums(W_OI).double() @ norms[name].double())
    threshold = M * total / max(sizes, 1)
    return {name: count_above(weight(), norms[name], [threshold])[0][0] for name, weight in weights.items()}


@dataclass
class OutlierCount:
    """Counts of one block, gathered while it is pruned; empty where no statistics were taken."""

    M: float
    weight: Callable[[Linear], Tensor]
    norms: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)

    def see(self, linears: Sequence[Linear], statistics: Mapping[str, Statistics]) -> None:
        """Keep the norms of all linears of a block, none of which is pruned yet."""
        self.norms = {name: one.squared_norms.float().sqrt() for name, one in statistics.items()}
        self.before = self._count(linears)

    def after(self, linears: Sequence[Linear]) -> dict[str, int]:
        return self._count(linears)

    def _count(self, linears: Sequence[Linear]) -> dict[str, int]:
        if not linears or any(linear.name not in self.norms for linear in linears):
            return {}
        # Looked up when they are asked for, because they change while a block is pruned.
        weights = {linear.name: partial(self.weight, linear) for linear in linears}
        return count_outliers(weights, self.norms, self.M)
