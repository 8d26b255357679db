"""The same sparsity everywhere: the baseline that every other allocator has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tawny.allocation import budget
from tawny.allocation.profile import Allocation, Profile
from tawny.calibration.statistics import Needs, Statistics

__all__ = ["Uniform"]


@dataclass(frozen=True)
class Uniform:
    """The same sparsity for every linear; needs no data."""

    compat: Literal["official"] | None = None

    needs: ClassVar[Needs] = "none"
    measures_weights: ClassVar[bool] = False

    def measure(self, linears: Mapping[str, tuple[Tensor, Statistics | None]]) -> dict[str, Any]:
        return {}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        raw = {linear.name: target for linear in profile.linears}
        return raw if self.compat == "official" else budget.exact(raw, profile.sizes, target)
