"""OBS of whole members: the one that costs least leaves, the others make up for it, and so on; then all are solved anew.

The optimal brain surgeon for structures: ZipLM (Kurtić 2023, NeurIPS, 2302.04089), SlimGPT (Ling 2024, NeurIPS, 2412.18110),
OSSCAR (Meng 2024, ICML, 2403.12983). With H = XᵀX of the consumer's inputs and S the columns of a member, taking the member away
costs at least

    tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ)   of squared output error, if   W −= W_S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,:   makes up for it,

after which H⁻¹ −= (H⁻¹)_:,S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,: is the inverse for what is left. Members leave one after another, or a few of the
cheapest at once where they are many: taking a few together is exact too, only their order is not asked again in between.
At the end the kept columns are W_k = (W H)_k H_kk⁻¹, free of what rounding added up. If the consumer has a bias, H is
the covariance: then what is lost on average costs nothing, and b += (W − W')·mean(X).

Where it is known what the model's output feels of the consumer's errors (output.py), G = L Lᵀ, costs are tr(G W_S […]⁻¹ W_Sᵀ): those
of Lᵀ W, which makes up for what left as W does. The last weight stays as it is: each of its rows is at its own minimum.

Shapes: G = members still there, C = columns of a member, O = out, I = in, S = columns that leave together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tawny.calibration.output import BLOCK, Factor
from tawny.calibration.statistics import Needs
from tawny.errors import NumericalError
from tawny.solvers.base import Columns, Damp, input_hessian, require_finite
from tawny.solvers.grid import ACCIDENTS
from tawny.solvers.inverse import invert, with_damping
from tawny.solvers.members import Chosen, Coupled, MemberSolver, input_moments
from tawny.solvers.output import damped
from tawny.solvers.refit import refit

_DELAYED = 256  # columns: a product of so many is bound by arithmetic, not by memory


@dataclass(frozen=True)
class Obs(MemberSolver):
    """Channels and heads that cost least go, one after another, and the rest makes up for each.

    Cost tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ), H = XᵀX + damp·mean(diag)·I, Kurtić et al. 2023 (2302.04089).

    Raises:
        NumericalError: a number is not finite, or the Hessian has no inverse even with 1000 times the damping.
        ValueError: no Hessian was given.
    """

    damp: Damp = 0.01
    group: Columns = 16  # that leave together
    bias: bool = False  # give consumers without a bias one

    needs: ClassVar[Needs] = "hessian"
    looks_at_rows: ClassVar[bool] = False
    output: ClassVar[Factor] = "whole"

    @property
    def wants_bias(self) -> bool:
        return self.bias

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        return super().workspace(out, width) + (16 * min(out, BLOCK) ** 2 if output == "whole" else 0)

    def choose(self, coupled: Coupled, removed: int) -> Chosen:
        W_OI, columns_GC = coupled.weight, coupled.columns
        require_finite(W_OI, "weight")
        hessian_II, mean_I = input_hessian(coupled.seen), None
        if coupled.biased and coupled.seen is not None and coupled.seen.tokens:
            mean_I = input_moments(coupled.seen)[0].float()
            hessian_II = torch.addr(hessian_II, mean_I, mean_I, alpha=-coupled.seen.tokens)
        H_II, inverse_II, damp = self._inverse(hessian_II)
        keep_G = torch.ones(len(columns_GC), dtype=torch.bool, device=W_OI.device)
        if removed:
            factor = damped(coupled.output)
            V_OI = W_OI.clone() if factor is None else factor.through(W_OI)
            together = max(1, self.group // columns_GC.shape[1])
            keep_G[_leave(V_OI, inverse_II, columns_GC, removed, together)] = False
        del inverse_II
        kept_K = columns_GC[keep_G].flatten().sort().values
        weight_OI = torch.zeros_like(W_OI)
        if removed:
            factor_KK = torch.linalg.cholesky(H_II[kept_K][:, kept_K])
            weight_OI[:, kept_K] = torch.cholesky_solve((W_OI @ H_II[:, kept_K]).T, factor_KK).T
            stays_OK = W_OI[:, kept_K] != 0
            if int((~stays_OK).sum()) > ACCIDENTS * stays_OK.numel():  # what was pruned before stays pruned
                free_OI = torch.zeros_like(W_OI, dtype=torch.bool)
                free_OI[:, kept_K] = stays_OK
                weight_OI, _ = refit(W_OI, free_OI, H_II, start=weight_OI, damp=0.0)
        else:
            weight_OI.copy_(W_OI)
        require_finite(weight_OI, "pruned weight")
        shift_O = None if mean_I is None else (W_OI - weight_OI) @ mean_I
        return Chosen(keep_G, weight_OI, shift_O, {"damp": damp})

    def _inverse(self, hessian_II: Tensor) -> tuple[Tensor, Tensor, float]:
        """H with damping, its inverse, and the damping that was needed; an input that never fired gets the mean."""
        energy_I = hessian_II.diagonal()
        mean = float(energy_I.mean()) or 1.0

        def attempt(damp: float) -> tuple[Tensor, Tensor, float] | None:
            H_II = hessian_II.to(torch.float32, copy=True)
            H_II.diagonal().add_(damp * mean).add_(energy_I <= 0, alpha=mean)
            inverse_II = invert(H_II.clone())
            return None if inverse_II is None else (H_II, inverse_II, damp)

        return with_damping(self.damp, len(hessian_II), attempt)


def _leave(W_OI: Tensor, inverse_II: Tensor, columns_GC: Tensor, removed: int, together: int) -> Tensor:
    """The members that leave, `together` at a time; W is changed in place, H⁻¹ is used up.

    H⁻¹ is large and what leaves at once is little, so H⁻¹ is not written each time. Of what left since, its rows and columns are
    kept, up to _DELAYED of them; members of one column need no more of H⁻¹ than its diagonal and their own rows.
    """
    left_G = torch.arange(len(columns_GC), device=W_OI.device)
    diagonal_I = inverse_II.diagonal().clone()
    since: list[tuple[Tensor, Tensor]] = []  # (H⁻¹)_S,: and [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,: of the time
    gone: list[Tensor] = []
    while removed:
        scores_G = _costs(W_OI, inverse_II, diagonal_I, columns_GC[left_G])
        if not bool(torch.isfinite(scores_G).all()):
            raise NumericalError("the cost of a member is NaN or infinite")
        lowest = scores_G.argsort(stable=True)[: min(together, removed)]
        S = columns_GC[left_G[lowest]].flatten()
        gone.append(left_G[lowest])
        stays_G = torch.ones_like(left_G, dtype=torch.bool)
        stays_G[lowest] = False
        left_G = left_G[stays_G]
        removed -= len(lowest)
        now_SI = inverse_II[S]
        for then_SI, made_SI in since:
            now_SI.addmm_(then_SI[:, S].T, made_SI, alpha=-1)
        rows_SI = torch.linalg.solve(now_SI[:, S], now_SI)
        W_OI.addmm_(W_OI[:, S], rows_SI, alpha=-1)
        diagonal_I -= (now_SI * rows_SI).sum(0)
        since.append((now_SI, rows_SI))
        if columns_GC.shape[1] > 1 or len(S) * len(since) >= _DELAYED:
            thens, mades = zip(*since, strict=True)
            inverse_II.addmm_(torch.cat(thens).T, torch.cat(mades), alpha=-1)
            since = []
    return torch.cat(gone)


def _costs(W_OI: Tensor, inverse_II: Tensor, diagonal_I: Tensor, columns_GC: Tensor) -> Tensor:
    """[G]: what taking each member away would cost."""
    if columns_GC.shape[1] == 1:
        columns_G = columns_GC[:, 0]
        return W_OI.square().sum(0)[columns_G] / diagonal_I[columns_G]
    costs = []
    for S in columns_GC:
        factor_SS = torch.linalg.cholesky(inverse_II[S][:, S])
        # W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ = (L⁻¹ W_Sᵀ)ᵀ (L⁻¹ W_Sᵀ)
        costs.append(torch.linalg.solve_triangular(factor_SS, W_OI[:, S].T, upper=False).square().sum())
    return torch.stack(costs)
