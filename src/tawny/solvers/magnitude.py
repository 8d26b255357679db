"""Magnitude pruning: the smallest |W| of a matrix go.

The oldest baseline; it looks at no data. Han et al., "Learning both weights and connections", NeurIPS 2015, 1506.02626.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tawny.calibration.statistics import Needs
from tawny.patterns import Pattern, Scope
from tawny.solvers.base import MaskSolver, keep_highest, require_finite, sizes
from tawny.solvers.experts import ExpertSolver, ExpertsSeen
from tawny.solvers.members import Chosen, Coupled, MemberSolver, chosen, column_sums_of
from tawny.solvers.output import roots


@dataclass(frozen=True)
class Magnitude(MaskSolver, MemberSolver, ExpertSolver):
    """The smallest weights of each matrix go; no data needed.

    Score |W_ij|, Han et al. 2015 (1506.02626).

    Raises:
        NumericalError: a weight is not finite.
    """

    needs: ClassVar[Needs] = "none"
    default_scope: ClassVar[Scope] = "matrix"
    looks_at_rows: ClassVar[bool] = False

    def keep(
        self, W_OI: Tensor, shared: Any, pattern: Pattern, sparsity: float, root_O: Tensor | None
    ) -> Tensor:
        # Zeros need no special care here: |0| is the lowest score there is.
        return keep_highest(sizes(W_OI, root_O), pattern, sparsity, self.default_scope)

    def choose(self, coupled: Coupled, removed: int) -> Chosen:
        """Members of the lowest sums of |W| go, over all their rows and columns."""
        require_finite(coupled.weight, "weight")
        scores_G = column_sums_of(sizes(coupled.weight, roots(coupled.output)), coupled.columns)
        for producer in coupled.producers:
            require_finite(producer.weight, "weight")
            scores_G += producer.weight.abs().sum(1, dtype=torch.float64)[producer.rows].sum(1)
        return chosen(coupled, scores_G, removed)

    def expert_scores(self, seen: ExpertsSeen) -> Tensor:
        return seen.sizes
