"""What an allocator reads, and what it gives.

A profile is a few numbers a block, taken from the dense model in one walk, beside the shapes of all prunable
linears. Both are plain data: a profile can be journalled, printed and allocated from again without the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tawny.calibration.output import Factor
from tawny.calibration.statistics import Needs, Statistics

DEFAULT_M = 5.0  # OWL's own

Linears = Mapping[str, tuple[Tensor, Statistics | None]]
"""{linear name: its weight, and what calibration saw of its inputs}"""

Allocation = dict[str, float]
"""{linear name: sparsity}"""


@dataclass(frozen=True)
class LinearInfo:
    """One prunable linear: its name, its [out, in] shape, and where in the model it sits."""

    name: str
    shape: tuple[int, int]
    block: int
    group: str = ""  # the stage of the block, "0" for the first linears that run, and so on
    coupling: str = ""  # whose members go as a whole, named by its consumer; "" where single weights go
    members: int = 0  # that the coupling has

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Profile:
    """All prunable linears in model order, and what `Allocator.measure` said of every block."""

    linears: tuple[LinearInfo, ...]
    measures: tuple[dict[str, Any], ...] = ()

    @property
    def blocks(self) -> int:
        return max([len(self.measures), *(linear.block + 1 for linear in self.linears)])

    @property
    def span(self) -> range:
        """From the first block that holds linears to the last."""
        held = [linear.block for linear in self.linears]
        return range(min(held), max(held) + 1) if held else range(0)

    @property
    def sizes(self) -> dict[str, int]:
        return {linear.name: linear.numel for linear in self.linears}

    def linears_of(self, block: int) -> tuple[LinearInfo, ...]:
        return tuple(linear for linear in self.linears if linear.block == block)

    def parameters(self, block: int) -> int:
        """How many prunable weights the block holds; 0 where everything was excluded."""
        return sum(linear.numel for linear in self.linears_of(block))


class Measuring(Protocol):
    """What reads a dense model in the profile walk. What stands here is true of one that measures nothing."""

    @property
    def needs(self) -> Needs:
        """Statistics of the dense model that `measure` wants."""
        return "none"

    @property
    def output(self) -> Factor:
        """What of the output's factor `measure` wants beside these statistics."""
        return "none"

    @property
    def measures_weights(self) -> bool:
        """Whether there is anything to measure; without it no walk is made."""
        return False

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Bytes that measuring a block takes beside its stored weights and statistics.

        By default the weight at hand in float32, its scores, and counting them.
        """
        return 16 * largest(shapes)

    def measure(self, linears: Linears) -> dict[str, Any]:
        """Numbers of one dense block, fit for JSON."""
        return {}


class Allocator(Measuring, Protocol):
    """The interface; a new allocator is one file and one entry of `SINGLE` in registry.py, its fields are its options."""

    @property
    def as_given(self) -> bool:
        """Somebody chose the numbers: an n:m pattern takes a whole n of each linear, and averages nothing."""
        return False

    @property
    def named_kinds(self) -> tuple[str, ...]:
        """The kinds that `kinds` gives, where it gives any."""
        return ()

    def kinds(self, profile: Profile) -> dict[str, str]:
        """The kind that each linear's survivors are rounded to, where the allocator says so too; else empty."""
        return {}

    @property
    def outlier_M(self) -> float:
        """A score above so many times the block's mean is counted as an outlier in the record."""
        return DEFAULT_M

    def work(self, linears: Sequence[LinearInfo]) -> float:
        """What `measure` costs beside statistics, in float32 operations that take as long."""
        return 0.0

    def allocate(self, profile: Profile, target: float) -> Allocation:
        """A sparsity for every linear of the profile, its parameter-weighted mean being the target."""
        ...


def largest(shapes: Sequence[tuple[int, int]]) -> int:
    """Weights of the largest linear of a block; 0 where there is none."""
    return max(map(math.prod, shapes), default=0)
