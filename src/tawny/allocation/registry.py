"""The allocators that decide on their own, by name: each works with its defaults, and `blend` takes the mean of any of them.

A new allocator is one file and one entry here. The room's face adds those that stand on others or on a file.
For `tawny search` to try it, its strengths stand in choosing/candidates.py.
"""

from __future__ import annotations

from tawny.allocation.alpha import Alpha
from tawny.allocation.atp import Atp
from tawny.allocation.curves import Curves
from tawny.allocation.dlp import Dlp
from tawny.allocation.er import Er, ErPlus
from tawny.allocation.global_ import Global
from tawny.allocation.lsa import Lsa
from tawny.allocation.owl import Owl
from tawny.allocation.profile import Allocator
from tawny.allocation.uniform import Uniform

SINGLE: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "er": Er,
    "er-plus": ErPlus,
    "global": Global,
    "owl": Owl,
    "dlp": Dlp,
    "alpha": Alpha,
    "atp": Atp,
    "lsa": Lsa,
    "curves": Curves,
}
