"""What multiplies by the inverse of G ⊗ H + ρ in ALPS, for every penalty ρ: the eigenbases of both.

With Gn = Q_g Λ_g Q_gᵀ of a diagonal block of G and Hn = Q_h Λ_h Q_hᵀ, both normalised, the S with Gn S Hn + ρS = R is

    S = Q_g [(Q_gᵀ R Q_h) / (λ_g λ_hᵀ + ρ)] Q_hᵀ,

four products instead of one. That of H is shared by the linears that share their input.

Shapes: R = rows of a diagonal block, I = in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tawny.solvers.output import Damped
from tawny.solvers.powers import CACHED, Scaled, eigenbasis, parts

WIDEST = 4096  # inputs: of more an eigenbasis takes minutes


class Eigenbases:
    """Of one linear."""

    def __init__(self, scaled: Scaled, factor: Damped) -> None:
        self.places, self.root_O = factor.places, factor.root_O
        self._inputs = scaled.eigenbasis()
        self._outputs = [eigenbasis(Gn_RR, scaled.dtype) for Gn_RR in factor.blocks()]

    def times_inverse(self, rho: float) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """For each diagonal block of G, a function that turns R, `[rows, in]`, into S; a scratch of R's shape is its second argument.

        S lies in the place of R.
        """
        return [partial(_through_both, basis, self._inputs, rho) for basis in self._outputs]

    def felt(self, place: int, D_RI: Tensor, H_II: Tensor) -> Tensor:
        """A number: tr(G D H Dᵀ) of the rows of a diagonal block, G damped and over its mean."""
        values_R, Q_RR = self._outputs[place]
        rotated_RI = Q_RR.T.to(D_RI.dtype) @ (D_RI * self.root_O[self.places[place], None])
        felt: Tensor = torch.linalg.vecdot(rotated_RI @ H_II, rotated_RI) @ values_R
        return felt


def _through_both(
    outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, Tensor], rho: float, R_RI: Tensor, spare_RI: Tensor
) -> Tensor:
    (values_R, Q_RR), (values_I, Q_II) = outputs, inputs
    torch.mm(R_RI, Q_II, out=spare_RI)
    torch.mm(Q_RR.T, spare_RI, out=R_RI)
    denominators = values_I.new_empty(R_RI[parts(R_RI, CACHED)[0]].shape)
    for part in parts(R_RI, CACHED):
        denominators_PI = denominators[: part.stop - part.start]
        torch.outer(values_R[part], values_I, out=denominators_PI).add_(rho)
        R_RI[part] = torch.div(R_RI[part], denominators_PI)
    torch.mm(Q_RR, R_RI, out=spare_RI)
    return torch.mm(spare_RI, Q_II.T, out=R_RI)
