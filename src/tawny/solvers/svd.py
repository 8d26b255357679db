"""SVD-LLM: the nearest weight of a lower rank, counted by what the inputs make of the difference.

Wang et al., "SVD-LLM: truncation-aware singular value decomposition for large language model compression", ICLR 2025, 2403.07378.
With H = XᵀX = L Lᵀ the squared output error of a change is ‖X(W − Ŵ)ᵀ‖² = ‖(W − Ŵ) L‖². So the best Ŵ of rank r comes from

    W L = U Σ Vᵀ,   Ŵ = U_r Σ_r V_rᵀ L⁻¹,

and its error is the sum of the squared singular values that were dropped. The factors hold r(out + in) numbers; here their product is
written dense, for studies of how ranks are shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tawny.calibration.output import OutputFactor
from tawny.calibration.statistics import Needs
from tawny.errors import NumericalError
from tawny.patterns import Pattern, Scope
from tawny.solvers.base import Damp, Seen, Solution, Solver, input_hessian
from tawny.solvers.grid import Grid


@dataclass(frozen=True)
class Svd(Solver):
    """Singular values of W·L that matter least go, and the weight is written dense.

    H = L Lᵀ = XᵀX + damp·mean(diag)·I, Wang et al. 2024 (2403.07378).

    Raises:
        NumericalError: a number is not finite, or the Hessian has no factor.
        ValueError: no Hessian was given.
    """

    damp: Damp = 0.01

    needs: ClassVar[Needs] = "hessian"
    default_scope: ClassVar[Scope] = "matrix"

    def prepare(self, statistics: Seen) -> Tensor:
        """L, `[in, in]` lower triangular."""
        H_II = input_hessian(statistics).float().clone()
        H_II.diagonal().add_(self.damp * (float(H_II.diagonal().mean()) or 1.0))
        L_II: Tensor
        L_II, info = torch.linalg.cholesky_ex(H_II)
        if int(info):
            raise NumericalError(
                f"the Hessian {list(H_II.shape)} has no factor with solver.damp={self.damp:g}; take a larger one"
            )
        return L_II

    def solved(
        self,
        W_OI: Tensor,
        shared: Tensor,
        pattern: Pattern,
        sparsity: float,
        grid: Grid | None,
        output: OutputFactor | None,
    ) -> Solution:
        """The weight of rank r = (1 − sparsity)·out·in / (out + in), at least 1."""
        out, width = W_OI.shape
        rank = max(1, round((1 - sparsity) * out * width / (out + width)))
        U_OK, s_K, V_KI = torch.linalg.svd(W_OI @ shared, full_matrices=False)
        kept_RI = torch.linalg.solve_triangular(shared, V_KI[:rank], upper=False, left=False)
        made_OI = (U_OK[:, :rank] * s_K[:rank]) @ kept_RI
        return Solution(made_OI, torch.ones_like(W_OI, dtype=torch.bool), {"rank": rank})
