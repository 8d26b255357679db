"""RIA: relative importance and activations; a weight counts by its share of its row and of its column.

Zhang et al., "Plug-and-play: an efficient post-training pruning method for large language models", ICLR 2024,
the score:

    score_ij = (|W_ij|/Σ_i|W_ij| + |W_ij|/Σ_j|W_ij|) · ‖X_j‖₂^a,   a = 0.5

so that no input and no output loses all of its weights, as can happen to columns with small weights under
Wanda. The scores of a whole matrix compete, as in the paper. Weights of an input that never fired go first, those with
the smallest shares before the others. The paper's channel permutation, which only
serves n:m, is not part of this.

Shapes: O = out, I = in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tawny.calibration.statistics import Needs
from tawny.patterns import Pattern, Scope, zeros_first
from tawny.solvers.base import MaskSolver, Seen, input_norms, keep_highest


@dataclass(frozen=True)
class RIA(MaskSolver):
    """Weights with a small share of their row and column, on quiet inputs, go; fast, no update.

    Score (|W_ij|/Σ_i|W_ij| + |W_ij|/Σ_j|W_ij|)·‖X_j‖₂^a, Zhang et al. 2024 (ICLR).

    Raises:
        NumericalError: a weight or an input is not finite.
        ValueError: no column norms were given.
    """

    a: Annotated[
        float, Field(ge=0, le=4, description="a power of the input's norm in [0, 4], such as 0.5")
    ] = 0.5

    needs: ClassVar[Needs] = "norms"
    default_scope: ClassVar[Scope] = "matrix"

    def prepare(self, statistics: Seen) -> Any:
        return input_norms(statistics).pow_(self.a)

    def keep(
        self, W_OI: Tensor, shared: Any, pattern: Pattern, sparsity: float, root_O: Tensor | None
    ) -> Tensor:
        size_OI = W_OI.abs()
        # Only rows and columns of zeros have no sum, and their weights' scores are set below.
        shares_I, shares_O = 1 / size_OI.sum(0).clamp_(min=1e-38), 1 / size_OI.sum(1).clamp_(min=1e-38)
        scores_OI = size_OI.mul_(shares_I + shares_O[:, None])
        if root_O is not None:
            scores_OI.mul_(root_O[:, None])
        silent_I = shared == 0
        if silent_I.any():  # inputs that never fire: first of all, and by their shares among themselves
            scores_OI[:, silent_I] = -1 / scores_OI[:, silent_I]
        scores_OI.mul_(torch.where(silent_I, 1.0, shared))
        zeros_first(scores_OI, W_OI)
        return keep_highest(scores_OI, pattern, sparsity, self.default_scope)
