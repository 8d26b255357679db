"""Magnitude pruning: the smallest |W| of a matrix go.

The oldest baseline; it looks at no data. Han et al., "Learning both weights and connections", NeurIPS 2015, 1506.02626.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tawny.patterns import Pattern, Scope
from tawny.solvers.base import Needs, Seen, Solution, Solver, keep_highest, masked, on_grid, require_finite
from tawny.solvers.grid import Grid

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Solver):
    """The smallest weights of each matrix go; no data needed.

    Score |W_ij|, Han et al. 2015 (1506.02626).

    Raises:
        NumericalError: a weight is not finite.
    """

    needs: ClassVar[Needs] = "none"
    default_scope: ClassVar[Scope] = "matrix"

    def workspace(self, out: int, width: int) -> int:
        return 20 * out * width  # measured, what judges the result included

    def solve(
        self,
        W_OI: Tensor,
        statistics: Seen,
        pattern: Pattern,
        sparsity: float,
        prepared: Any = None,
        grid: Grid | None = None,
    ) -> Solution:
        require_finite(W_OI, "weight")
        # Zeros need no special care here: |0| is the lowest score there is.
        keep_OI = keep_highest(W_OI.abs(), pattern, sparsity, self.default_scope)
        return on_grid(Solution(masked(W_OI, keep_OI), keep_OI), grid, statistics)
