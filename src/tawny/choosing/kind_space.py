"""The search space of kinds: some linears gain bits and others lose some, within the bytes of a model or of a token."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tawny.allocation.profile import Allocation
from tawny.choosing.level import KINDS_TRIED, Level
from tawny.choosing.space import Levels, Space
from tawny.choosing.table import Finalist, Table

_TRIES = 50


@dataclass(frozen=True)
class KindSpace(Space):
    """Level k is the k-th kind that is tried, from 1; each linear may move to the kinds beside the one that was chosen.

    Attributes:
        start: what was chosen.
        takes: of each linear, what each of its levels takes of what may be spent.
        room: what all linears may take together.
    """

    start: Levels
    takes: tuple[Mapping[int, float], ...]
    room: float

    @property
    def uniform(self) -> Levels:
        return self.start

    def levels_of(self, index: int) -> Sequence[int]:
        return tuple(self.takes[index])

    def level(self, index: int, number: int) -> Level:
        return Level(0.0, KINDS_TRIED[number - 1])

    def allocation(self, levels: Levels) -> Allocation:
        """Nothing is removed."""
        return {}

    def nearest(self, allocation: Allocation) -> Levels:
        return self.start

    def mutated(self, levels: Levels, chance: random.Random) -> Levels:
        """One to three linears gain bits, and others lose some until the model fits."""
        moved = list(levels)
        for _ in range(chance.randint(1, 3)):
            gaining = [i for i, number in enumerate(moved) if number - 1 in self.takes[i]]
            if gaining:
                moved[chance.choice(gaining)] -= 1
        for _ in range(_TRIES):
            if sum(takes[number] for takes, number in zip(self.takes, moved, strict=True)) <= self.room:
                return tuple(moved)
            losing = [i for i, number in enumerate(moved) if number + 1 in self.takes[i]]
            if not losing:
                break
            moved[chance.choice(losing)] += 1
        return levels


def make_kind_space(table: Table, start: Finalist) -> KindSpace:
    """Around a finalist that removes nothing."""
    chosen = tuple(1 + KINDS_TRIED.index(start.levels[x.name].kind) for x in table.linears)
    place = {level: i for i, level in enumerate(table.every)}
    takes = tuple(
        {
            number: own[place[Level(0.0, KINDS_TRIED[number - 1])]]
            for number in (each - 1, each, each + 1)
            if 1 <= number <= len(KINDS_TRIED)
        }
        for own, each in zip(table.takes, chosen, strict=True)
    )
    room = table.room.budget - table.limit.rest - table.limit.of_head(start.head)
    room -= table.limit.of_embedding(start.embedding or start.head)
    return KindSpace(table.linears, 0, len(KINDS_TRIED), chosen, takes, room)
