"""A level: one choice for one linear, and what it costs.

A search tries sparsities, and a fit pairs of sparsity and kind; both ask a `Level` how a linear is solved. What a level costs in
nats, relative to a rounding that was measured, is in `Measures`; what it takes of a budget is in limit.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tawny.kinds import KINDS, scaled_kinds

# Of a fit, the most bits first.
KINDS_TRIED = tuple(sorted((kind.name for kind in scaled_kinds()), key=lambda name: -KINDS[name].bits))
SPARSITIES = (0.0, 0.5, 0.7)  # below, a mask takes more than it saves of any kind but int8
PROBE = "int4"  # far enough from the dense model to be measured, near enough for errors to add up


@dataclass(frozen=True)
class Level:
    """What one linear gets.

    Attributes:
        sparsity: share of its weights that are removed.
        kind: how the survivors are stored; "" is what the recipe says.
    """

    sparsity: float
    kind: str = ""


def levels_tried(kinds: Sequence[str] = KINDS_TRIED, sparsities: Sequence[float] = SPARSITIES) -> list[Level]:
    """Those of a fit, the same of each linear."""
    return [Level(sparsity, kind) for sparsity in sparsities for kind in kinds]


@dataclass(frozen=True)
class Measures:
    """Relative errors of one linear, on a sample of its rows, and what its weight is like.

    Attributes:
        bits: by kind, rounded.
        zeros: by sparsity.
        had: zeros of the weight as it came, a number.
        far: groups of a row lie so far apart that scales take, or may take, 16 bits (`Grid.suiting`, kernels/scales.py).
        rounds: by kind, the share of weights that are rounded to 0; empty where an earlier version measured.
    """

    bits: Mapping[str, float]
    zeros: Mapping[str, float]
    had: int
    far: bool
    rounds: Mapping[str, float] = field(default_factory=dict)

    def relative(self, level: Level) -> float:
        """The error of a level, as a multiple of the probe's."""
        probe = self.bits[PROBE]
        zeros = self.zeros[str(level.sparsity)] if level.sparsity else 0.0
        return (self.bits[level.kind] + zeros) / probe if probe > 0 else 0.0


UNMEASURED = Measures({}, {}, 0, far=False)
