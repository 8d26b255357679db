"""FLAP: members whose output hardly fluctuates go, and the bias takes over what they gave on average.

An et al., "Fluctuation-based adaptive structured pruning for large language models", AAAI 2024, 2312.11983. With the input X_j
of the consumer's column j, the score of a member is Σ_j var(X_j)·‖W_:,j‖² (eq. 5), and the bias that the consumer gets is
b += W_:,S·mean(X_S) (eq. 4). The paper also shares the budget by standardised scores of all layers; here an allocator does.
Of heads its authors' code sums the squares of these scores, and it measures the dense model throughout; here they are summed
as they are, after pruned blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tawny.calibration.statistics import Needs
from tawny.solvers.base import require_finite
from tawny.solvers.members import Chosen, Coupled, MemberSolver, chosen, column_sums_of, input_moments


@dataclass(frozen=True)
class Flap(MemberSolver):
    """Channels and heads whose output fluctuates least go; their mean goes into the bias.

    Score var(X_j)·‖W_:,j‖², An et al. 2024 (2312.11983).

    Raises:
        NumericalError: a weight or an input is not finite.
        ValueError: no means of inputs were given.
    """

    bias: bool = True  # give consumers without a bias one

    needs: ClassVar[Needs] = "moments"
    looks_at_rows: ClassVar[bool] = False

    @property
    def wants_bias(self) -> bool:
        return self.bias

    def choose(self, coupled: Coupled, removed: int) -> Chosen:
        W_OI = coupled.weight
        require_finite(W_OI, "weight")
        mean_I, variance_I = input_moments(coupled.seen)
        choice = chosen(
            coupled, column_sums_of(W_OI.double().square().mul_(variance_I), coupled.columns), removed
        )
        gone_I = coupled.columns[~choice.keep].flatten()
        choice.shift = (W_OI[:, gone_I].double() @ mean_I[gone_I]).float()
        return choice
