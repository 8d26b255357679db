"""What a fit chooses from: levels for each linear and the head under a number of bytes, and the finalists of a size."""

from __future__ import annotations

__all__ = ["Finalist", "Found", "Table", "check_budget"]

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tawny.allocation.knapsack import choose
from tawny.allocation.profile import LinearInfo
from tawny.errors import RecipeError
from tawny.kinds import KINDS
from tawny.pruning.prepare import Job
from tawny.searching.fit_bytes import PackedSize
from tawny.searching.fit_measure import (
    KINDS_TRIED,
    Level,
    Measures,
    levels,
)
from tawny.words import size

_CURVE = 24  # sizes that the picture's line of expectations is drawn through


@dataclass(frozen=True)
class Finalist:
    """A model that fits.

    Attributes:
        levels: of each linear.
        group: columns of a scale; None is each kind's usual number.
        head: kind of the head; None leaves it as it is.
        bytes: at most; packing may find a few integers that are 0.
        expected: divergence from the dense model, nats a token, as far as single measurements add up.
    """

    name: str
    levels: Mapping[str, Level]
    group: int | None
    head: str | None
    bytes: int
    expected: float

    @property
    def uniform(self) -> str | None:
        """The kind of all linears, where it is one and nothing is removed."""
        every = set(self.levels.values())
        one = next(iter(every))
        return one.kind if len(every) == 1 and not one.sparsity else None


@dataclass(frozen=True)
class Found:
    measures: dict[str, Measures]
    reactions: dict[str, float]
    head: dict[str, float]


class Table:
    """What each level of each linear costs and takes, and of the head."""

    def __init__(self, job: Job, sizes: PackedSize, found: Found) -> None:
        self.job, self.sizes, self.linears, self.every = job, sizes, job.linears, levels()
        self.found = found
        self.costs = [[self.cost(x.name, level) for level in self.every] for x in self.linears]
        self.bytes = [[self._size(x, level, None) for level in self.every] for x in self.linears]
        self.heads: list[str | None] = [None, *found.head]
        self.head_costs = [0.0, *found.head.values()]

    def cost(self, name: str, level: Level) -> float:
        return self.found.reactions[name] * self.found.measures[name].relative(level)

    def _size(self, x: LinearInfo, level: Level, group: int | None) -> int:
        return self.sizes.linear(x, level.sparsity, level.kind, group, self.found.measures[x.name].had)

    def chosen(self, budget: float, name: str = "", *, zeros: bool) -> Finalist | None:
        """The least cost that fits; None where nothing does."""
        usable = [i for i, level in enumerate(self.every) if zeros or not level.sparsity]
        costs = [[item[i] for i in usable] for item in self.costs]
        taken = [[float(item[i]) for i in usable] for item in self.bytes]
        heads = [float(self.sizes.of_head(kind)) for kind in self.heads]
        picked = choose([*costs, self.head_costs], [*taken, heads], budget - self.sizes.rest)
        if picked is None:
            return None
        of = {x.name: self.every[usable[p]] for x, p in zip(self.linears, picked, strict=False)}
        return self._finalist(name, of, None, self.heads[picked[-1]])

    def _finalist(self, name: str, of: Mapping[str, Level], group: int | None, head: str | None) -> Finalist:
        total = self.sizes.rest + self.sizes.of_head(head)
        total += sum(self._size(x, of[x.name], group) for x in self.linears)
        expected = math.fsum(self.cost(x.name, of[x.name]) for x in self.linears)
        return Finalist(name, of, group, head, total, expected + self.head_costs[self.heads.index(head)])

    def uniform(self, budget: float) -> Finalist | None:
        """One kind for all linears, by expected divergence; of groups the one that fills the size best."""
        fits = []
        for kind in KINDS_TRIED:
            for group in KINDS[kind].groups:
                for head in self.heads:
                    of = dict.fromkeys((x.name for x in self.linears), Level(0.0, kind))
                    columns = "rows" if group is None else f"groups of {group}"
                    named = f"uniform {kind} in {columns}, head {head or 'as it is'}"
                    fits.append(self._finalist(named, of, group, head))
        fits = [each for each in fits if each.bytes <= budget]
        return min(fits, key=lambda each: (each.expected, -each.bytes), default=None)

    def finalists(self, budget: float) -> list[Finalist]:
        """Each once."""
        made = [
            self.chosen(budget, "zeros and bits by the linear", zeros=True),
            self.chosen(budget, "bits by the linear", zeros=False),
            self.uniform(budget),
        ]
        if made[0] is not None and not any(level.sparsity for level in made[0].levels.values()):
            made[0] = None
        if made[1] is not None and made[1].uniform is not None and made[2] is not None:
            made[1] = None
        return [each for each in made if each is not None]

    def curve(self) -> list[tuple[int, float]]:
        """Sizes, and the least divergence that is expected there."""
        smallest = self.sizes.rest + sum(min(x) for x in self.bytes)
        smallest += min(self.sizes.of_head(kind) for kind in self.heads)
        largest = self.sizes.rest + sum(max(x) for x in self.bytes) + self.sizes.of_head(None)
        step = (largest / smallest) ** (1 / (_CURVE - 1))
        found = (self.chosen(smallest * step**i, zeros=True) for i in range(_CURVE))
        return [(each.bytes, each.expected) for each in found if each is not None]


def check_budget(job: Job, sizes: PackedSize, budget: int) -> None:
    least = sizes.rest + min(sizes.of_head(kind) for kind in (None, *KINDS_TRIED))
    least += sum(min(sizes.linear(x, l.sparsity, l.kind) for l in levels()) for x in job.linears)
    if budget < least:
        raise RecipeError(
            f"{job.source} cannot be made as small as {size(budget)}: the least that linears, head and all that stays as it is "
            f"take is {size(least)}; give --size {least} (or --bits {_up(8 * least / job.parameters)}), or more"
        )


def _up(bits: float) -> str:
    """Not less than it is, for a person who is going to ask for it."""
    return f"{math.ceil(1000 * bits) / 1000:.3f}"
