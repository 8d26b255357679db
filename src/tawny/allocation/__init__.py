"""One file an allocator, each a pure function of a profile; budget.py makes any of them exact."""

from __future__ import annotations

from tawny.allocation.alpha import Alpha
from tawny.allocation.atp import Atp
from tawny.allocation.blend import Blend
from tawny.allocation.curves import Curves
from tawny.allocation.dlp import Dlp
from tawny.allocation.er import Er, ErPlus
from tawny.allocation.file import File
from tawny.allocation.global_ import Global
from tawny.allocation.lsa import Lsa
from tawny.allocation.owl import Owl, measure_outliers
from tawny.allocation.profile import Allocation, Allocator, LinearInfo, Profile
from tawny.allocation.registry import SINGLE
from tawny.allocation.uniform import Uniform

__all__ = [
    "ALLOCATORS",
    "Allocation",
    "Allocator",
    "Alpha",
    "Atp",
    "Blend",
    "Curves",
    "Dlp",
    "Er",
    "ErPlus",
    "File",
    "Global",
    "LinearInfo",
    "Lsa",
    "Owl",
    "Profile",
    "Uniform",
    "measure_outliers",
]

ALLOCATORS: dict[str, type[Allocator]] = {**SINGLE, "blend": Blend, "file": File}
