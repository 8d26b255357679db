"""One file an allocator, each a pure function of a profile; budget.py makes any of them exact."""

from __future__ import annotations

from tawny.allocation.owl import Owl, measure_outliers
from tawny.allocation.profile import Allocation, Allocator, LinearInfo, Profile
from tawny.allocation.uniform import Uniform

__all__ = [
    "ALLOCATORS",
    "Allocation",
    "Allocator",
    "LinearInfo",
    "Owl",
    "Profile",
    "Uniform",
    "measure_outliers",
]

ALLOCATORS: dict[str, type[Allocator]] = {"uniform": Uniform, "owl": Owl}
