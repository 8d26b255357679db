"""The search space of whole members: the linears of a coupling, or of a mixture, share a level, and one level is some of its members.

Channels are many and small, heads few and large. Where heads are few, one level is one group of them. So a move may give a
block its heads back and let channels go for them, here or elsewhere. The search decides what `whole_members` can only guess:
how many heads should go with the channels.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tawny.allocation.budget import whole_experts, whole_members
from tawny.allocation.profile import Allocation, LinearInfo, Profile
from tawny.choosing.level import Level
from tawny.choosing.space import Levels, Space, WeightSpace, make_space, repaired
from tawny.pruning.prepare import Job


@dataclass(frozen=True)
class _Coupled:
    """One coupling: at level k it loses `base + k·step` of its members.

    Attributes:
        places: of its linears.
        weight: of one member, in weights.
        most: members that may leave.
    """

    places: tuple[int, ...]
    members: int
    most: int
    weight: int
    base: int
    step: int
    low: int
    high: int

    def removed(self, level: int) -> int:
        return self.base + max(self.low, min(self.high, level)) * self.step


@dataclass(frozen=True)
class MemberSpace(Space):
    """Levels of whole members: the linears of a coupling share theirs, and lose at level 0 what uniform removes.

    Equal couplings of a block, such as experts, move as one.

    Attributes:
        target: sparsity of the whole model.
    """

    target: float
    units: tuple[_Coupled, ...]

    @property
    def reach(self) -> tuple[float, float]:
        """The sparsities of the lowest and the highest level of the coupling with the most members."""
        unit = self._finest
        return unit.removed(unit.low) / unit.members, unit.removed(unit.high) / unit.members

    @property
    def _finest(self) -> _Coupled:
        return max(self.units, key=lambda unit: unit.members)

    @functools.cached_property
    def _unit_of(self) -> dict[int, _Coupled]:
        return {place: unit for unit in self.units for place in unit.places}

    def levels_of(self, index: int) -> range:
        """The levels that one linear has, which are those of its coupling."""
        unit = self._unit_of[index]
        return range(unit.low, unit.high + 1)

    def level(self, index: int, number: int) -> Level:
        """What one linear gets at one level."""
        unit = self._unit_of[index]
        return Level(unit.removed(number) / unit.members)

    def told(self, level: int) -> str:
        """A level of the coupling with the most members, for a person."""
        unit = self._finest
        return f"{unit.removed(level) / unit.members:.1%}"

    def allocation(self, levels: Levels) -> Allocation:
        """Whole members that meet the budget to one of the smallest; couplings of these share what levels leave over."""
        own = self._of_units(levels)
        removed = [unit.removed(level) for unit, level in zip(self.units, own, strict=True)]
        smallest = min(unit.weight for unit in self.units)
        fine = [place for place, unit in enumerate(self.units) if unit.weight == smallest]
        owed = round(-self._beyond(own) / smallest)
        for turn, place in enumerate(fine):
            part = owed * (turn + 1) // len(fine) - owed * turn // len(fine)
            removed[place] = min(self.units[place].most, max(0, removed[place] + part))
        of_unit = dict(zip(self.units, removed, strict=True))
        units = (self._unit_of[place] for place in range(len(self.linears)))
        return {x.name: of_unit[unit] / unit.members for x, unit in zip(self.linears, units, strict=True)}

    def within(self, allocation: Allocation) -> Allocation:
        """An allocation as the levels that follow it most closely: what can be scored as it is."""
        return self.allocation(self.nearest(allocation))

    def nearest(self, allocation: Allocation) -> Levels:
        """The levels that follow an allocation most closely within the budget."""
        wishes = [
            (self._share(allocation, unit) * unit.members - unit.base) / unit.step for unit in self.units
        ]
        levels = [
            max(unit.low, min(unit.high, round(wish))) for unit, wish in zip(self.units, wishes, strict=True)
        ]
        low, high = [unit.low for unit in self.units], [unit.high for unit in self.units]
        return self._of_linears(repaired(levels, wishes, self._steps, low, high))

    def _share(self, allocation: Allocation, unit: _Coupled) -> float:
        """What an allocation takes of a unit: equal experts may be given unequal shares."""
        parts = [self.linears[place] for place in unit.places]
        return sum(allocation[x.name] * x.numel for x in parts) / sum(x.numel for x in parts)

    def mutated(self, levels: Levels, chance: random.Random) -> Levels:
        """One to three couplings move by a level, and others, by chance, so that the budget is met again."""
        moved = list(self._of_units(levels))
        for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
            self._move(moved, chance)
        return self._of_linears(moved)

    def _move(self, levels: list[int], chance: random.Random) -> None:
        before, first = list(levels), chance.randrange(len(levels))
        levels[first] += chance.choice((-1, 1))
        if self.units[first].low <= levels[first] <= self.units[first].high:
            while excess := self._beyond(levels):
                move = -1 if excess > 0 else 1
                legal = [
                    place
                    for place, (unit, step) in enumerate(zip(self.units, self._steps, strict=True))
                    if place != first
                    and unit.low <= levels[place] + move <= unit.high
                    and abs(excess + move * step) < abs(excess)
                ]
                if not legal:
                    break
                levels[chance.choice(legal)] += move
            if 2 * abs(self._beyond(levels)) <= min(self._steps):
                return
        levels[:] = before

    @functools.cached_property
    def _steps(self) -> list[int]:
        return [unit.step * unit.weight for unit in self.units]

    def _beyond(self, levels: Sequence[int]) -> int:
        return sum(level * step for level, step in zip(levels, self._steps, strict=True))

    def _of_units(self, levels: Levels) -> list[int]:
        return [levels[unit.places[0]] for unit in self.units]

    def _of_linears(self, levels: Sequence[int]) -> Levels:
        of_linears = [0] * len(self.linears)
        for unit, level in zip(self.units, levels, strict=True):
            for place in unit.places:
                of_linears[place] = level
        return tuple(of_linears)


SparsitySpace = WeightSpace | MemberSpace


def space_of(job: Job, levels: int) -> SparsitySpace:
    """The space that a recipe's budget is moved in."""
    if job.couplings or job.mixtures:
        return make_member_space(job.linears, job.recipe.sparsity, levels, job.limits)
    rounds = bool(job.recipe.values.names)
    return make_space(job.linears, job.pattern, job.recipe.sparsity, levels, rounds=rounds)


def make_member_space(
    linears: tuple[LinearInfo, ...],
    target: float,
    levels: int,
    limits: Mapping[str, tuple[int, int]] | None = None,
) -> MemberSpace:
    """Level 0 is what uniform removes; the others are spread over half of the way to 0 or 1, whichever is nearer.

    Args:
        linears: with their couplings.
        levels: an odd number.
        limits: of mixtures, as of `whole_experts`.

    Raises:
        RecipeError: the target would leave a coupling without members, or a mixture fewer experts than have to stay.
    """
    half, wish, profile = levels // 2, {x.name: target for x in linears}, Profile(linears)
    uniform = whole_experts(wish, profile, target, limits) if limits else whole_members(wish, profile, target)
    sizes = Counter({linear.coupling: 0 for linear in linears})
    for linear in linears:
        sizes[linear.coupling] += linear.numel
    # Equal couplings of a block are experts, which keep equally many: their members are one of each.
    places: dict[tuple[int, int, int], list[int]] = {}
    for place, linear in enumerate(linears):
        places.setdefault((linear.block, linear.members, sizes[linear.coupling]), []).append(place)
    units = []
    for some in places.values():
        members = linears[some[0]].members
        base = round(uniform[linears[some[0]].name] * members)
        once, stay = (limits or {}).get(linears[some[0]].coupling, (1, 1))
        step = once * max(1, round(0.5 * min(target, 1 - target) * members / half / once)) if half else once
        low, high = -min(half, base // step), min(half, (members - stay - base) // step)
        weight = sum(linears[place].numel for place in some) // members
        units.append(_Coupled(tuple(some), members, members - stay, weight, base, step, low, high))
    low, high = min(unit.low for unit in units), max(unit.high for unit in units)
    if not (low and high):  # what one coupling gains another loses, so nothing moves
        low, high, units = 0, 0, [replace(unit, low=0, high=0) for unit in units]
    return MemberSpace(linears, low, high, target, tuple(units))
