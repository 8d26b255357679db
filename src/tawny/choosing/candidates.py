"""What a search tries first: each allocator over a grid of its strengths.

The grid starts with what each allocator does when nothing is chosen, and holds the values of the papers. A search tries a new
allocator once it stands in the tables of both functions here, and in `FAMILIES` of settings.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tawny.allocation.alpha import Alpha
from tawny.allocation.atp import Atp, largest_beta
from tawny.allocation.blend import Blend
from tawny.allocation.curves import Curves
from tawny.allocation.dlp import Dlp
from tawny.allocation.joint import Joint, Survey
from tawny.allocation.lsa import Lsa
from tawny.allocation.owl import Owl
from tawny.allocation.profile import Allocator
from tawny.allocation.scores import half_band

OWL_MS = (3.0, 5.0, 7.0, 10.0)
# The default first. Half of the slope of depth was better than all of it on text unlike the calibration's.
_BLENDS = (Blend.of, "atp,owl", "atp,uniform", "alpha,owl")


def allocators_to_try(
    names: Sequence[str], target: float, blocks: int
) -> Iterator[tuple[str, str, Allocator]]:
    """Family, name with strengths, and allocator; the families in turn, so that few trials see a bit of everything.

    Args:
        target: sparsity; what strengths make sense depends on it.
        blocks: that hold something to prune.
    """
    steepest = largest_beta(target, blocks)
    band = half_band(target)  # of ATP and LSA where nobody chooses
    nearest_end = min(target, 1 - target)
    slope = min(1.0, band / nearest_end) if nearest_end > 0 else 0.0
    every: dict[str, list[Allocator]] = {
        "curves": [Curves(strength=value) for value in (0.75, 1.0, 0.5)],
        "owl": [Owl(M=M, lambda_=value) for value in (0.08, 0.15, 0.04) for M in (5.0, 7.0, 3.0, 10.0)],
        "dlp": [Dlp(alpha=value) for value in (0.15, 0.1, 0.05, 0.2)],
        "atp": [Atp(beta=value * steepest) for value in dict.fromkeys((slope, 0.5, 0.25, 0.75))],
        "lsa": [
            Lsa(alpha=value, granularity=part)
            for value in dict.fromkeys((band, 0.15, 0.05))
            for part in ("block", "linear")
        ],
        "alpha": [Alpha(epsilon=value) for value in (0.3, 0.2, 0.1)],
        "blend": [Blend(of) for of in _BLENDS],
    }
    options = {
        "curves": ("strength",),
        "owl": ("M", "lambda_"),
        "dlp": ("alpha",),
        "atp": ("beta",),
        "lsa": ("granularity", "alpha"),
    }
    options |= {"alpha": ("epsilon",), "blend": ("of",)}
    for turn in itertools.zip_longest(*(every[name] for name in names)):
        for family, allocator in zip(names, turn, strict=True):
            if allocator is not None:
                strengths = " ".join(
                    f"{key.rstrip('_')}={_shown(vars(allocator)[key])}" for key in options[family]
                )
                yield family, f"{family} {strengths}", allocator


def surveyed(names: Sequence[str]) -> Survey:
    """What the candidates read from a block. ATP measures nothing, and OWL reads the outlier shares."""
    blended = dict.fromkeys(name for of in _BLENDS for name in of.split(","))
    readers: dict[str, Allocator] = {
        "curves": Curves(),
        "dlp": Dlp(),
        "lsa": Lsa(),
        "alpha": Alpha(),
        "blend": Blend(",".join(blended)),
    }
    return Survey(Joint({name: readers[name] for name in names if name in readers}), OWL_MS)


def _shown(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else value
