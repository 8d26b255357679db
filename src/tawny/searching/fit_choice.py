"""What a fit chooses from: levels for each linear and the head under a number of bytes, and the finalists of a size."""

from __future__ import annotations

__all__ = ["Finalist", "Found", "Table"]

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tawny.allocation.knapsack import choose
from tawny.allocation.profile import LinearInfo
from tawny.kinds import KINDS
from tawny.pruning.prepare import Job
from tawny.searching.fit_bytes import PackedSize
from tawny.searching.fit_measure import (
    KINDS_TRIED,
    Level,
    Measures,
    levels,
)
from tawny.searching.fit_target import Limit, Room

_CURVE = 24  # sizes that the picture's line of expectations is drawn through


@dataclass(frozen=True)
class Finalist:
    """A model that fits.

    Attributes:
        levels: of each linear.
        group: columns of a scale; None is each kind's usual number.
        head: kind of the head; None leaves it as it is.
        bytes: at most; packing may find a few integers that are 0.
        takes: of what may be spent: the same bytes, or those that a token reads.
        expected: divergence from the dense model, nats a token, as far as single measurements add up.
    """

    name: str
    levels: Mapping[str, Level]
    group: int | None
    head: str | None
    bytes: int
    takes: float
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

    def __init__(self, job: Job, sizes: PackedSize, room: Room, found: Found) -> None:
        self.job, self.sizes, self.linears, self.every = job, sizes, job.linears, levels()
        self.room, self.limit = room, room.limit
        self.found = found
        self.costs = [[self.cost(x.name, level) for level in self.every] for x in self.linears]
        self.takes = [[self._takes(self.limit, x, level) for level in self.every] for x in self.linears]
        self.heads: list[str | None] = [None, *found.head]
        self.head_costs = [0.0, *found.head.values()]

    def cost(self, name: str, level: Level) -> float:
        return self.found.reactions[name] * self.found.measures[name].relative(level)

    def _takes(self, limit: Limit, x: LinearInfo, level: Level, group: int | None = None) -> float:
        found = self.found.measures[x.name]
        return limit.linear(x, level.sparsity, level.kind, group, found.had, found.far)

    def _whole(self, limit: Limit, of: Mapping[str, Level], group: int | None, head: str | None) -> float:
        linears = sum(self._takes(limit, x, of[x.name], group) for x in self.linears)
        return limit.rest + limit.of_head(head) + linears

    def chosen(self, budget: float, name: str = "", *, zeros: bool) -> Finalist | None:
        """The least cost that fits; None where nothing does."""
        usable = [i for i, level in enumerate(self.every) if zeros or not level.sparsity]
        costs = [[item[i] for i in usable] for item in self.costs]
        taken = [[float(item[i]) for i in usable] for item in self.takes]
        heads = [float(self.limit.of_head(kind)) for kind in self.heads]
        picked = choose([*costs, self.head_costs], [*taken, heads], budget - self.limit.rest)
        if picked is None:
            return None
        of = {x.name: self.every[usable[p]] for x, p in zip(self.linears, picked, strict=False)}
        return self.finalist(name, of, None, self.heads[picked[-1]])

    def finalist(self, name: str, of: Mapping[str, Level], group: int | None, head: str | None) -> Finalist:
        """A model of these levels."""
        expected = math.fsum(self.cost(x.name, of[x.name]) for x in self.linears)
        expected += self.head_costs[self.heads.index(head)]
        size = int(self._whole(self.sizes, of, group, head))
        return Finalist(name, of, group, head, size, self._whole(self.limit, of, group, head), expected)

    def uniform(self) -> Finalist | None:
        """One kind for all linears, by expected divergence; of groups the one that fills the size best."""
        fits = []
        for kind in KINDS_TRIED:
            for group in KINDS[kind].groups:
                for head in self.heads:
                    of = dict.fromkeys((x.name for x in self.linears), Level(0.0, kind))
                    columns = "rows" if group is None else f"groups of {group}"
                    named = f"uniform {kind} in {columns}, head {head or 'as it is'}"
                    fits.append(self.finalist(named, of, group, head))
        fits = [each for each in fits if each.takes <= self.room.budget]
        return min(fits, key=lambda each: (each.expected, -each.takes), default=None)

    def finalists(self) -> list[Finalist]:
        """Each once."""
        budget = self.room.budget
        made = [
            self.chosen(budget, "zeros and bits by the linear", zeros=True),
            self.chosen(budget, "bits by the linear", zeros=False),
            self.uniform(),
        ]
        if made[0] is not None and not any(level.sparsity for level in made[0].levels.values()):
            made[0] = None
        if made[1] is not None and made[1].uniform is not None and made[2] is not None:
            made[1] = None
        return [each for each in made if each is not None]

    def curve(self) -> list[tuple[int, float]]:
        """What may be spent, and the least divergence that is expected there."""
        least = self.limit.rest + sum(min(x) for x in self.takes)
        least += min(self.limit.of_head(kind) for kind in self.heads)
        most = self.limit.rest + sum(max(x) for x in self.takes) + self.limit.of_head(None)
        step = (most / least) ** (1 / (_CURVE - 1))
        found = (self.chosen(least * step**i, zeros=True) for i in range(_CURVE))
        return [(each.bytes, each.expected) for each in found if each is not None]
