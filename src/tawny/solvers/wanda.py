"""Wanda: weights whose product with their input's norm is small go, row by row, and nothing is updated.

Sun et al., "A simple and effective pruning approach for large language models", 2306.11695.
Score `|W_ij| · ‖X_j‖₂`. Rows differ by at most one weight, so that the linear's budget is exact. Weights of an
input that never fired go first, the smallest before the larger, so an expert that saw no token is pruned by
magnitude. `compat="official"` removes ⌊in·s⌋ of every row by a stable sort, as the authors' code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tawny.calibration.statistics import Needs
from tawny.patterns import Pattern, Scope, Unstructured, keep_mask_rows, zeros_first
from tawny.solvers.base import MaskSolver, Seen, input_norms, keep_highest, require_finite, sizes
from tawny.solvers.members import Chosen, Coupled, MemberSolver, chosen, column_sums_of
from tawny.solvers.output import roots


@dataclass(frozen=True)
class Wanda(MaskSolver, MemberSolver):
    """Small weights on quiet inputs go, row by row; fast, no update.

    Score |W_ij|·‖X_j‖₂, Sun et al. 2023 (2306.11695).

    Raises:
        NumericalError: a weight or an input is not finite.
        ValueError: no column norms were given.
    """

    compat: Literal["official"] | None = None

    needs: ClassVar[Needs] = "norms"
    default_scope: ClassVar[Scope] = "row"
    looks_at_rows: ClassVar[bool] = True

    def prepare(self, statistics: Seen) -> Any:
        return input_norms(statistics)

    def keep(
        self, W_OI: Tensor, shared: Any, pattern: Pattern, sparsity: float, root_O: Tensor | None
    ) -> Tensor:
        scores_OI = sizes(W_OI, root_O).mul_(shared)
        if self.compat == "official" and pattern in (Unstructured(), Unstructured("row")):
            rows, width = W_OI.shape
            return keep_mask_rows(scores_OI, torch.full((rows,), min(width, int(width * sparsity))))
        silent_I = shared == 0
        if silent_I.any():  # inputs that never fire: first of all, and by magnitude among themselves
            scores_OI[:, silent_I] = -1 / sizes(W_OI[:, silent_I], root_O)
        zeros_first(scores_OI, W_OI)
        return keep_highest(scores_OI, pattern, sparsity, self.default_scope)

    def choose(self, coupled: Coupled, removed: int) -> Chosen:
        """Members of the lowest sums of scores go, over all their rows and columns."""
        require_finite(coupled.weight, "weight")
        size_OI = sizes(coupled.weight, roots(coupled.output))
        scores_G = column_sums_of(size_OI.mul_(input_norms(coupled.seen)), coupled.columns)
        for producer in coupled.producers:
            require_finite(producer.weight, "weight")
            rows_O = (producer.weight.abs() @ input_norms(producer.seen)).double()
            scores_G += rows_O[producer.rows].sum(1)
        return chosen(coupled, scores_G, removed)
