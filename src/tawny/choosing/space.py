"""The search space: a candidate is a tuple of levels, one whole number for each linear; a space says which `Level` it is.

Only the spaces know which levels there are: of single weights here, of whole members and experts in
member_space.py. The rest of the room solves levels, compares tuples of them, and asks a space to move in them.

Level k of single weights means that a linear loses `target·n + k·step` of its n weights, the steps of all linears being
proportional to their sizes (or, for n:m, one n of every m). So moving a level from one linear to another of the same size, or
from one block to another of the same shape, keeps the budget to the weight.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tawny.allocation.budget import exact
from tawny.allocation.profile import Allocation, LinearInfo
from tawny.choosing.level import Level
from tawny.patterns import NM, Pattern

Levels = tuple[int, ...]
_HIGHEST = 0.99  # sparsity of the last level; a linear without weights is not worth a solution


@dataclass(frozen=True)
class Space(ABC):
    """The linears of a model, the levels that each may have, and how to move in them within a limit.

    Attributes:
        linears: in model order.
        low, high: the lowest and the highest level of any linear; where they are the same, nothing can move.
    """

    linears: tuple[LinearInfo, ...]
    low: int
    high: int

    @property
    def levels(self) -> range:
        return range(self.low, self.high + 1)

    @property
    def uniform(self) -> Levels:
        """The baseline, tried first; what the blocks before a linear are solved at."""
        return (0,) * len(self.linears)

    def levels_of(self, index: int) -> Sequence[int]:
        """The levels that one linear has; here all of them."""
        return self.levels

    @abstractmethod
    def level(self, index: int, number: int) -> Level:
        """What one linear gets at one level."""

    def sparsity(self, index: int, number: int) -> float:
        return self.level(index, number).sparsity

    def changes(self, index: int, number: int) -> bool:
        """Whether a linear is another one at a level than in the dense model."""
        level = self.level(index, number)
        return level.sparsity > 0 or bool(level.kind)

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes that the solutions of all levels take; a level that changes nothing takes none."""
        return sum(
            linear.numel * dtype.itemsize
            for i, linear in enumerate(self.linears)
            for number in self.levels_of(i)
            if self.changes(i, number)
        )

    @abstractmethod
    def allocation(self, levels: Levels) -> Allocation:
        """The sparsities of a candidate, within the limit."""

    @abstractmethod
    def nearest(self, allocation: Allocation) -> Levels:
        """The levels that follow an allocation most closely within the limit."""

    @abstractmethod
    def mutated(self, levels: Levels, chance: random.Random) -> Levels:
        """Another candidate near this one, within the limit; the same where there is none."""


@dataclass(frozen=True)
class WeightSpace(Space):
    """Levels of single weights: each linear has all of them, and loses `target` at level 0.

    Attributes:
        target: sparsity of the whole model.
        steps: what one level of each linear is worth, in weights.
        pattern: n:m levels are whole steps of n.
        rounds: solving rounds what it keeps, so that a level that removes nothing changes weights too.
    """

    target: float
    steps: tuple[int, ...]
    pattern: Pattern
    rounds: bool = False

    def level(self, index: int, number: int) -> Level:
        """What one linear gets at one level."""
        if isinstance(self.pattern, NM):
            return Level(1.0 - (self.pattern.n - number) / self.pattern.m)
        numel = self.linears[index].numel
        return Level(min(1.0, max(0.0, self.target + number * self.steps[index] / numel)))

    def changes(self, index: int, number: int) -> bool:
        return self.rounds or self.sparsity(index, number) > 0

    @property
    def reach(self) -> tuple[float, float]:
        """The sparsities of the lowest and the highest level."""
        return self.sparsity(0, self.low), self.sparsity(0, self.high)

    def told(self, level: int) -> str:
        """A level of the first linear, for a person."""
        if isinstance(self.pattern, NM):
            return f"{self.pattern.n - level}:{self.pattern.m}"
        return f"{self.sparsity(0, level):.1%}" if self.linears else "0%"

    def allocation(self, levels: Levels) -> Allocation:
        """Sparsities that meet the budget to the weight (n:m: to what whole steps allow)."""
        raw = {x.name: self.sparsity(i, levels[i]) for i, x in enumerate(self.linears)}
        if isinstance(self.pattern, NM):
            return raw
        return exact(raw, {x.name: x.numel for x in self.linears}, self.target)

    def within(self, allocation: Allocation) -> Allocation:
        """An allocation held between the lowest and the highest level, within the budget: what can be scored as it is."""
        if isinstance(self.pattern, NM):
            return self.allocation(self.nearest(allocation))
        places = range(len(self.linears))
        low = max((self.sparsity(i, self.low) for i in places), default=0.0)
        high = min((self.sparsity(i, self.high) for i in places), default=1.0)
        if all(low <= allocation[x.name] <= high for x in self.linears):
            return allocation
        return exact(allocation, {x.name: x.numel for x in self.linears}, self.target, low, high)

    def nearest(self, allocation: Allocation) -> Levels:
        """The levels that follow an allocation most closely within the budget.

        What rounding takes from one linear goes to the next one, so that a block between two levels gets some of each.
        """
        wishes = [
            (allocation[x.name] - self.target) * x.numel / step
            for x, step in zip(self.linears, self.steps, strict=True)
        ]
        levels, carry = [], 0.0
        for wish, step in zip(wishes, self.steps, strict=True):
            level = self._clamp(round(wish + carry / step))
            carry += (wish - level) * step
            levels.append(level)
        return self._repaired(levels, wishes)

    def _clamp(self, level: int) -> int:
        return max(self.low, min(self.high, level))

    def _repaired(self, levels: list[int], wishes: Sequence[float]) -> Levels:
        count = len(levels)
        return repaired(levels, wishes, self.steps, [self.low] * count, [self.high] * count)

    def mutated(self, levels: Levels, chance: random.Random) -> Levels:
        """A few switches of one level each; few are likelier than many."""
        moved = list(levels)
        for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
            switch = chance.choice((self._switch_blocks, self._switch_linears))
            for _ in range(20):  # a place at its last level cannot give or take
                if switch(moved, chance):
                    break
        return tuple(moved)

    def _switch_linears(self, levels: list[int], chance: random.Random) -> bool:
        first = chance.randrange(len(levels))
        others = [i for i, step in enumerate(self.steps) if step == self.steps[first] and i != first]
        return bool(others) and self._move(levels, [first], [chance.choice(others)])

    def _switch_blocks(self, levels: list[int], chance: random.Random) -> bool:
        blocks: dict[int, list[int]] = {}
        for i, linear in enumerate(self.linears):
            blocks.setdefault(linear.block, []).append(i)
        first = chance.choice(list(blocks))
        shape = sorted(self.steps[i] for i in blocks[first])
        others = [
            block
            for block, members in blocks.items()
            if block != first and sorted(self.steps[i] for i in members) == shape
        ]
        return bool(others) and self._move(levels, blocks[first], blocks[chance.choice(others)])

    def _move(self, levels: list[int], up: list[int], down: list[int]) -> bool:
        legal = all(levels[i] < self.high for i in up) and all(levels[i] > self.low for i in down)
        if legal:
            for i in up:
                levels[i] += 1
            for i in down:
                levels[i] -= 1
        return legal


def repaired(
    levels: list[int],
    wishes: Sequence[float],
    steps: Sequence[int],
    low: Sequence[int],
    high: Sequence[int],
) -> Levels:
    """Move the levels that are cheapest to move until the budget is met, or cannot be met more closely."""
    excess = sum(level * step for level, step in zip(levels, steps, strict=True))
    while excess:
        move = -1 if excess > 0 else 1
        legal = [
            (abs(level + move - wish) - abs(level - wish), i)
            for i, (level, wish) in enumerate(zip(levels, wishes, strict=True))
            if low[i] <= level + move <= high[i] and abs(excess + move * steps[i]) < abs(excess)
        ]
        if not legal:
            break
        _, chosen = min(legal)
        levels[chosen] += move
        excess += move * steps[chosen]
    return tuple(levels)


def make_space(
    linears: tuple[LinearInfo, ...], pattern: Pattern, target: float, levels: int, *, rounds: bool = False
) -> WeightSpace:
    """As many levels as asked for, half of them on each side of the target, where they fit.

    What one linear gains another loses, so where nothing fits on one side only level 0 is left. Levels are spread over half of
    the way to 0 or 1, whichever is nearer, as in EvoPress. n:m has its own steps.

    Args:
        levels: an odd number.
        rounds: as of `WeightSpace`.
    """
    half = levels // 2
    if isinstance(pattern, NM):
        steps = tuple(x.numel // pattern.m for x in linears)
        target, low, high = pattern.sparsity, -min(half, pattern.m - pattern.n), min(half, pattern.n - 1)
    else:
        wanted = 0.5 * min(target, 1 - target) / half
        common = math.gcd(*(x.numel for x in linears)) or 1
        if wanted * common >= 1:  # steps in proportion to sizes, so that sums of them can cancel
            steps = tuple(round(wanted * common) * (x.numel // common) for x in linears)
        else:
            steps = tuple(max(1, round(wanted * x.numel)) for x in linears)
        widest = max((s / x.numel for s, x in zip(steps, linears, strict=True)), default=1.0)
        low = -min(half, int(target / widest + 1e-9)) if wanted else 0
        high = min(half, max(0, int((_HIGHEST - target) / widest + 1e-9))) if wanted else 0
    return WeightSpace(linears, low if high else 0, high if low else 0, target, steps, pattern, rounds)
