"""The outlier distribution before and after, on statistics that are at hand while a block is pruned.

A weight is an outlier when |W|·‖X‖ is above M times the block's mean (OWL, 2310.05175, section 3). Solvers that look
at inputs leave column norms behind, so counting once with the dense and once with the pruned weights costs two more
reads of a block and no forward. Both counts see the same inputs: those that reach the block behind the already pruned
blocks, which is where they differ from a profile of the dense model.
"""

from __future__ import annotations

__all__ = ["OutlierCount", "count_outliers"]

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tawny.allocation.scores import magnitude_parts
from tawny.calibration.statistics import Statistics
from tawny.model.linears import Linear


def count_outliers(weights: Mapping[str, Tensor], norms: Mapping[str, Tensor], M: float) -> dict[str, int]:
    """How many scores of each linear are above `M` times the mean score of all of them together.

    Args:
        weights: `[out, in]` of every linear of one block, in any float dtype; a part at a time is made float32.
        norms: `[in]`, ‖X_j‖₂ of each linear's inputs; a common factor does not matter.
    """
    sizes, total = 0, 0.0
    for name, W_OI in weights.items():
        sizes += W_OI.numel()
        sums_I = sum(part.sum(0) for part in magnitude_parts(W_OI))
        total += float(torch.as_tensor(sums_I).double() @ norms[name].double()) if W_OI.numel() else 0.0
    threshold = M * total / max(sizes, 1)
    counts = {}
    for name, W_OI in weights.items():
        scores = (part.mul_(norms[name]) for part in magnitude_parts(W_OI))
        counts[name] = sum(int(torch.count_nonzero(part.gt(threshold))) for part in scores)
    return counts


@dataclass
class OutlierCount:
    """Counts of one block, gathered while it is pruned; empty where no statistics were taken."""

    M: float
    weight: Callable[[Linear], Tensor]
    norms: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)

    def see(self, linears: Sequence[Linear], statistics: Mapping[str, Statistics], *, dense: bool) -> None:
        """Keep the norms of `linears`; `dense` says that these are all of the block, none of them pruned yet."""
        for linear in linears:
            if linear.name in statistics:
                self.norms[linear.name] = statistics[linear.name].squared_norms.float().sqrt()
        if dense:
            self.before = self._count(linears)

    def after(self, linears: Sequence[Linear]) -> dict[str, int]:
        return self._count(linears)

    def _count(self, linears: Sequence[Linear]) -> dict[str, int]:
        if not linears or any(linear.name not in self.norms for linear in linears):
            return {}
        return count_outliers(_OnDemand(self.weight, linears), self.norms, self.M)


class _OnDemand(Mapping[str, Tensor]):
    """Weights that are looked up when they are asked for, because they change while a block is pruned."""

    def __init__(self, weight: Callable[[Linear], Tensor], linears: Sequence[Linear]) -> None:
        self._weight = weight
        self._linears = {linear.name: linear for linear in linears}

    def __getitem__(self, name: str) -> Tensor:
        return self._weight(self._linears[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)
