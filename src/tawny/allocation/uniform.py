"""The same sparsity everywhere: the baseline that every other allocator has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tawny.allocation import budget
from tawny.allocation.profile import Allocation, Allocator, Profile


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same sparsity for every linear; needs no data."""

    compat: Literal["official"] | None = None

    def allocate(self, profile: Profile, target: float) -> Allocation:
        raw = {linear.name: target for linear in profile.linears}
        return raw if self.compat == "official" else budget.exact(raw, profile.sizes, target)
