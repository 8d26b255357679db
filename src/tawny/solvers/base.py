"""What a solver is: a pure function from a weight and its input's statistics to a pruned weight.

A solver is a frozen dataclass whose fields are its options. It never changes its arguments, gives the same
result for the same input, and raises NumericalError where a number is not finite (the caller adds the
linear's name).

Linears that share an input share its statistics: `prepare` does the part of the work that depends on nothing
else, once, and `solve` accepts the result for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tawny.calibration.statistics import Needs, Statistics
from tawny.errors import NumericalError
from tawny.patterns import Pattern, Scope

__all__ = [
    "Needs",
    "Solution",
    "Solver",
    "energy",
    "input_norms",
    "masked",
    "reconstruction_error",
    "require_finite",
]


@dataclass
class Solution:
    """A pruned weight: zero where `mask` is False."""

    weight: Tensor  # [out, in] float32
    mask: Tensor  # [out, in] bool, True = kept
    notes: dict[str, float | int | str] = field(default_factory=dict)


class Solver(Protocol):
    """The interface; a new solver is one file and one entry of SOLVERS."""

    needs: ClassVar[Needs]
    default_scope: ClassVar[Scope]

    def prepare(self, statistics: Statistics | None) -> Any:
        """Work that linears with the same input share; None where there is none."""
        ...

    def solve(
        self,
        W_OI: Tensor,
        statistics: Statistics | None,
        pattern: Pattern,
        sparsity: float,
        prepared: Any = None,
    ) -> Solution:
        """Prune one weight to `sparsity` (n:m: to what the pattern says)."""
        ...


def require_finite(values: Tensor, what: str) -> None:
    """Raise NumericalError when `values` hold a NaN or an infinity."""
    # A finite sum proves every term finite and costs one read; only a suspicious one is looked at closely.
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NumericalError(f"{bad} of {values.numel()} numbers of the {what} are NaN or infinite")


def masked(W_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """The weight where kept, else +0. A product is vectorised where a masked fill is not; +0 mends its −0."""
    return torch.mul(W_OI, keep_OI).add_(0.0)


def input_norms(statistics: Statistics | None) -> Tensor:
    """[in]: ‖X_j‖₂ of every input, checked."""
    if statistics is None:
        raise ValueError("this solver needs column norms, but no statistics were given")
    require_finite(statistics.squared_norms, "input's squared norms")
    if (statistics.squared_norms < 0).any():
        raise NumericalError("a squared norm of the input is negative")
    return statistics.squared_norms.float().sqrt()


def energy(D_OI: Tensor, H_II: Tensor) -> float:
    """tr(D H Dᵀ) = ‖X Dᵀ‖²: what the weight change D does to the linear's output."""
    return float(((D_OI @ H_II) * D_OI).sum(dtype=torch.float64))


def reconstruction_error(W_OI: Tensor, pruned_OI: Tensor, H_II: Tensor) -> float:
    """tr((W − W')H(W − W')ᵀ) / tr(WHWᵀ): the share of the output's energy that pruning destroyed."""
    lost = energy(W_OI - pruned_OI, H_II)
    whole = energy(W_OI, H_II)
    if whole <= 0:
        return 0.0 if lost <= 0 else float("inf")
    return max(lost, 0.0) / whole
