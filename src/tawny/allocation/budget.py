"""Make any wish exact: the budget is a number of weights, and it is met to the weight.

An allocator says what it would like; this file shifts all wishes by one common amount so that, with every
linear held between its bounds, the whole model loses exactly ⌊target · parameters⌉ weights. Nobody's share
differs by more than one weight from the shifted wish, and equal wishes on equal linears stay equal up to that
one weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from tawny.allocation.profile import Allocation, Profile
from tawny.errors import NumericalError, RecipeError
from tawny.patterns import removed_count

_THREE_DECIMALS = 5.1e-4  # 0.333 is how people write 2:3
_MISSED = 1e-3  # of all weights: what equal widths of all blocks may miss a target by


def exact(
    raw: Mapping[str, float], sizes: Mapping[str, int], target: float, low: float = 0.0, high: float = 1.0
) -> Allocation:
    """Shift `raw` sparsities, clamped to [low, high], until they remove exactly `target` of all weights.

    Every sparsity is a whole number of weights, `removed_count(size, sparsity) / size`, and these numbers add up to
    `removed_count(total, target)`.
    """
    _check(raw, target, low, high)
    shifted = _shift(raw, sizes, target, low, high)
    return _whole(shifted, sizes, removed_count(sum(sizes[name] for name in raw), target))


def mixed_nm(allocation: Mapping[str, float], profile: Profile, m: int, target_n: int) -> Allocation:
    """Turn a per-block wish into n:m: block l keeps n_l of every m, 1 ≤ n_l ≤ m, as sparsities 1 − n_l/m.

    The total kept differs from `target_n`:m everywhere by at most one step of n in one block (by nothing at
    all where blocks are equally large).
    """
    if not 1 <= target_n <= m:
        raise RecipeError(f"pattern {target_n}:{m} keeps {target_n} of every {m}; expected 1 ≤ n ≤ m")
    blocks = [block for block in range(profile.blocks) if profile.parameters(block)]
    sizes = {str(block): profile.parameters(block) for block in blocks}
    wish = {
        str(block): math.fsum(allocation[linear.name] * linear.numel for linear in profile.linears_of(block))
        / profile.parameters(block)
        for block in blocks
    }
    target = 1 - target_n / m
    _check(wish, target, 0.0, 1 - 1 / m)
    kept = {name: m * (1 - s) for name, s in _shift(wish, sizes, target, 0.0, 1 - 1 / m).items()}
    n = {name: math.floor(_snap(value)) for name, value in kept.items()}
    missing = target_n * sum(sizes.values()) - sum(n[name] * sizes[name] for name in n)
    for name in sorted(n, key=lambda name: n[name] - kept[name]):  # the largest remainder first
        if n[name] < m and 2 * missing >= sizes[name] and kept[name] > n[name]:
            n[name] += 1
            missing -= sizes[name]
    return {linear.name: 1 - n[str(linear.block)] / m for linear in profile.linears}


def mixed_bits(
    allocation: Mapping[str, float], sizes: Mapping[str, int], bits: Sequence[int], mean: float
) -> dict[str, int]:
    """Turn wishes for sparsities around `1 − mean/most bits` into bits a weight: some of `bits` for each linear.

    A linear that would keep more weights gets more bits: the mixed precision of OWL's appendix (2310.05175). The mean over all
    weights is at most `mean`, and below it by less than the step that one linear would still take.
    """
    levels = sorted(set(bits))
    least, most = levels[0], levels[-1]
    shifted = _shift(allocation, sizes, 1 - mean / most, 0.0, 1 - least / most)
    wish = {name: _snap(most * (1 - share)) for name, share in shifted.items()}
    chosen = {name: max(level for level in levels if level <= value) for name, value in wish.items()}
    left = mean * sum(sizes[name] for name in wish) - sum(chosen[name] * sizes[name] for name in chosen)
    above = dict(pairwise(levels))

    def behind(name: str) -> float:  # of the step to the next level, the share that the wish has gone
        low = chosen[name]
        return (wish[name] - low) / (above[low] - low) if low in above else 0.0

    rose = True
    while rose:  # a linear may rise more than once where others are too large
        rose = False
        for name in sorted(chosen, key=behind, reverse=True):
            step = (above.get(chosen[name], math.inf) - chosen[name]) * sizes[name]
            if step <= left + 1e-9:
                chosen[name], left, rose = above[chosen[name]], left - step, True
    return chosen


@dataclass(frozen=True)
class _Unit:
    """One coupling, as the budget sees it: it loses members of `cost` weights each."""

    name: str
    block: int
    members: int
    size: int

    @property
    def cost(self) -> float:
        return self.size / self.members


def _of_couplings(
    wish: Mapping[str, float], profile: Profile, sizes: Mapping[str, int], target: float
) -> dict[str, float]:
    """What is wished for the linears of each coupling together."""
    raw = dict.fromkeys(sizes, 0.0)
    for linear in profile.linears:
        raw[linear.coupling] += wish[linear.name] * linear.numel / sizes[linear.coupling]
    _check(raw, target, 0.0, 1.0)
    return raw


def whole_members(wish: Mapping[str, float], profile: Profile, target: float) -> Allocation:
    """Turn wishes for linears into whole members of their couplings, each of which keeps at least one.

    A coupling of few large members (heads) loses a member once its share pays for all of it. What its share does not pay for
    goes to the coupling of many small members (channels) in its block, so that blocks that are wanted alike stay alike. Where this misses the target by more than a thousandth, what is left of one
    block goes on to the next, and the total is exact to one member of one block. Equal couplings of a block that are wanted
    alike (experts) lose equally many, since one tensor may hold them all: there the total is exact to one member of each.

    Raises:
        RecipeError: the target would leave a block without heads or channels; says what is possible.
    """
    units = _units(profile)
    sizes = {unit.name: unit.size for unit in units}
    most = {unit.name: (unit.members - 1) / unit.members for unit in units}
    total = sum(sizes.values())
    reach = math.fsum(most[unit.name] * unit.size for unit in units) / total
    if target > reach:
        least = min(units, key=lambda unit: unit.members)
        raise RecipeError(
            f"sparsity {target:g} leaves nothing of some couplings ({least.name} has {least.members} members and keeps one); the "
            f"most that is possible is {math.floor(reach * 1e4) / 1e4:g}"
        )
    raw = _of_couplings(wish, profile, sizes, target)
    share = _shift({name: round(value, 12) for name, value in raw.items()}, sizes, target, 0.0, most)
    removed = _rounded(units, share, across_blocks=False)
    apart = abs(sum(removed[unit.name] * unit.cost for unit in units) - target * total)
    if apart > _MISSED * total:
        removed = _rounded(units, share, across_blocks=True)
    by_name = {unit.name: unit for unit in units}
    return {x.name: removed[x.coupling] / by_name[x.coupling].members for x in profile.linears}


def whole_experts(
    wish: Mapping[str, float], profile: Profile, target: float, limits: Mapping[str, tuple[int, int]]
) -> Allocation:
    """Turn wishes for linears into whole experts: as many of each mixture where these are wanted alike, else exact in all.

    Args:
        limits: of each mixture (`LinearInfo.coupling`) how many experts leave at once, one of each group, and how many stay.

    Raises:
        RecipeError: the target leaves a mixture fewer experts than have to stay, or removes none.
    """
    units = _units(profile)
    sizes = {unit.name: unit.size for unit in units}
    most = {unit.name: (unit.members - limits[unit.name][1]) / unit.members for unit in units}
    total = sum(sizes.values())
    reach = math.fsum(most[name] * sizes[name] for name in sizes) / total
    if target > reach:
        least = min(units, key=lambda unit: most[unit.name])
        raise RecipeError(
            f"sparsity {target:g} leaves {least.name} fewer than {limits[least.name][1]} of {least.members} experts, which its router "
            f"needs to pick from; the most that is possible is {math.floor(reach * 1e4) / 1e4:g}"
        )
    raw = _of_couplings(wish, profile, sizes, target)
    share = _shift({name: round(value, 9) for name, value in raw.items()}, sizes, target, 0.0, most)
    # An allocator's wishes for equal linears differ by a weight: it rounds to whole ones.
    alike = max(share.values()) - min(share.values()) <= 4 / min(x.numel for x in profile.linears)
    carried = 0.0
    removed: dict[str, int] = {}
    for unit in units:
        step, stay = limits[unit.name]
        wanted = (target if alike else share[unit.name]) * unit.members + (0.0 if alike else carried)
        removed[unit.name] = step * min((unit.members - stay) // step, max(0, round(_snap(wanted / step))))
        carried = wanted - removed[unit.name]
    if not any(removed.values()):
        step, every = max((limits[unit.name][0], unit.members) for unit in units)
        raise RecipeError(
            f"sparsity {target:g} removes no whole expert: the least is {step} of {every}, so give {step / every:.4g} or more"
        )
    members = {unit.name: unit.members for unit in units}
    return {x.name: removed[x.coupling] / members[x.coupling] for x in profile.linears}


def whole_ranks(wish: Mapping[str, float], profile: Profile, target: float) -> Allocation:
    """Turn wishes into whole ranks of at least 1, as sparsities 1 − r(out + in) / (out·in).

    The factors hold at most as many numbers as the target leaves, and fewer by less than one rank of one linear.

    Raises:
        RecipeError: ranks of 1 are too much already; says what is possible.
    """
    sizes, costs = profile.sizes, {linear.name: sum(linear.shape) for linear in profile.linears}
    most = {name: 1 - costs[name] / sizes[name] for name in sizes}
    total = sum(sizes.values())
    reach = 1 - sum(costs.values()) / total
    if target > reach:
        raise RecipeError(
            f"sparsity {target:g} leaves less than rank 1 of each linear; the most that is possible is {math.floor(reach * 1e4) / 1e4:g}"
        )
    _check(wish, target, 0.0, 1.0)
    share = _shift(wish, sizes, target, 0.0, most)
    kept = {name: _snap((1 - share[name]) * sizes[name] / costs[name]) for name in sizes}
    rank = {name: max(1, math.floor(value)) for name, value in kept.items()}
    left = (1 - target) * total - sum(rank[name] * costs[name] for name in rank)
    order, rose = sorted(rank, key=lambda name: rank[name] - kept[name]), True  # the largest remainder first
    while rose:  # what is too little for one linear may be another rank of a smaller one
        rose = False
        for name in order:
            if costs[name] <= left + 1e-6 and (rank[name] + 1) * costs[name] <= sizes[name]:
                rank[name], left, rose = rank[name] + 1, left - costs[name], True
    return {name: 1 - rank[name] * costs[name] / sizes[name] for name in rank}


def given_members(wish: Mapping[str, float], profile: Profile) -> Allocation:
    """Numbers that each linear was given on purpose, as the nearest whole members of its coupling."""
    allocation: Allocation = {}
    for unit in _units(profile):
        linears = [linear for linear in profile.linears if linear.coupling == unit.name]
        share = math.fsum(wish[x.name] * x.numel for x in linears) / unit.size
        count = min(unit.members - 1, round(_snap(share * unit.members)))
        allocation |= {linear.name: count / unit.members for linear in linears}
    return allocation


def given_blocks(wish: Mapping[str, float], profile: Profile) -> Allocation:
    """Numbers that each linear was given on purpose: 1 for all of a block, or 0.

    Raises:
        RecipeError: a block would leave in part, or all of them would leave.
    """
    for block in range(profile.blocks):
        given = {wish[linear.name] for linear in profile.linears_of(block)}
        if len(given) > 1 or given - {0.0, 1.0}:
            name = profile.linears_of(block)[0].name
            raise RecipeError(
                f"block {block} (first {name}) is given sparsity {', '.join(f'{x:g}' for x in sorted(given))}; blocks leave as a whole: "
                "expected 1 for all of its linears, or 0"
            )
    if all(value == 1 for value in wish.values()):
        raise RecipeError("the allocation lets every block leave; expected 0 for one of them at least")
    return dict(wish)


def _units(profile: Profile) -> list[_Unit]:
    """The couplings, block by block, those of few large members first."""
    units: dict[str, _Unit] = {}
    for x in profile.linears:
        size = units[x.coupling].size if x.coupling in units else 0
        units[x.coupling] = _Unit(x.coupling, x.block, x.members, size + x.numel)
    return sorted(units.values(), key=lambda unit: (unit.block, -unit.cost))


def _rounded(units: Sequence[_Unit], share: Mapping[str, float], across_blocks: bool) -> dict[str, int]:
    """Members that each coupling loses; what rounding leaves over is carried on, within its block or to the next one too.

    Only the smallest members of a block are rounded to the nearest number. Of two or three heads the nearest number would often
    be a whole one too many, which costs more than the channels that could go instead (docs/log/heads.md). Equal couplings of a
    block that are wanted alike (experts) are rounded as one, whose members are one of each.
    """
    groups = _alike(units, share)
    smallest = {unit.block: unit.name for unit, *_ in groups}
    removed: dict[str, int] = {}
    carried, block = 0.0, -1
    for some in groups:
        unit, cost = some[0], len(some) * some[0].cost
        if unit.block != block and not across_blocks:
            carried = 0.0
        block = unit.block
        wanted = sum(share[x.name] * x.size for x in some) + carried
        paid = _snap(wanted / cost)
        count = round(paid) if smallest[block] == unit.name else math.floor(paid)
        count = min(unit.members - 1, max(0, count))
        removed |= {x.name: count for x in some}
        carried = wanted - count * cost
    for some in reversed(groups) if across_blocks else ():  # what the last ones could not take
        unit, cost = some[0], len(some) * some[0].cost
        count = min(unit.members - 1, max(0, removed[unit.name] + round(_snap(carried / cost))))
        carried -= (count - removed[unit.name]) * cost
        removed |= {x.name: count for x in some}
    return removed


def _alike(units: Sequence[_Unit], share: Mapping[str, float]) -> list[list[_Unit]]:
    """The couplings, those of a block together that are equal and whose shares differ by less than half a member.

    An allocator's wishes for equal linears differ by a weight: it rounds to whole ones.
    """
    groups: list[list[_Unit]] = []
    for _, block in groupby(units, key=lambda unit: unit.block):
        own: list[list[_Unit]] = []
        for unit in block:
            for some in own:
                first = some[0]
                apart = abs(share[first.name] - share[unit.name]) * unit.members
                if (first.members, first.size) == (unit.members, unit.size) and apart < 0.5:
                    some.append(unit)
                    break
            else:
                own.append([unit])
        groups += own
    return groups


def given_nm(allocation: Mapping[str, float], m: int) -> Allocation:
    """Numbers that each linear was given on purpose, as the 1 − n/m that they are.

    Raises:
        RecipeError: one is not a whole n of m; names the linear and what could be written instead.
    """
    given: Allocation = {}
    for name, sparsity in allocation.items():
        kept = m * (1 - sparsity)
        n = round(kept)
        if not 1 <= n <= m or abs(sparsity - (1 - n / m)) > _THREE_DECIMALS:
            legal = {min(m, max(1, int(kept))), min(m, max(1, math.ceil(kept)))}
            near = " or ".join(f"{1 - k / m:g} ({k} of {m})" for k in sorted(legal, reverse=True))
            raise RecipeError(
                f"{name} is given sparsity {sparsity:g}, which keeps {kept:.4g} of every {m} weights; expected a whole "
                f"number from 1 to {m}: write {near}"
            )
        given[name] = 1 - n / m
    return given


def spread_in_blocks(allocation: Mapping[str, float], profile: Profile) -> dict[int, float]:
    """How far apart the linears of a block are, for blocks in which rounding to whole weights does not explain it."""
    spread = {}
    for block in range(profile.blocks):
        linears = profile.linears_of(block)
        if linears:
            values = [allocation[linear.name] for linear in linears]
            apart = max(values) - min(values)
            # A mean of rounded allocations is rounded again, so each linear may be two weights off.
            if apart > 4 / min(linear.numel for linear in linears):
                spread[block] = apart
    return spread


def _check(raw: Mapping[str, float], target: float, low: float, high: float) -> None:
    for name, value in raw.items():
        if not math.isfinite(value):
            raise NumericalError(
                f"the allocator wants a sparsity of {value} for {name}; expected a finite number"
            )
    if not (low - 1e-12 <= target <= high + 1e-12):
        raise RecipeError(
            f"a mean sparsity of {target:g} is out of reach when each must be within [{low:g}, {high:g}]"
        )


def _shift(
    raw: Mapping[str, float],
    sizes: Mapping[str, int],
    target: float,
    low: float,
    high: float | Mapping[str, float],
) -> dict[str, float]:
    """clamp(raw + t) with the one t whose weighted mean is the target; `high` may be one for each."""
    if not raw:
        return {}
    total = sum(sizes[name] for name in raw)
    most = high if isinstance(high, Mapping) else dict.fromkeys(raw, high)

    def shifted(t: float) -> dict[str, float]:
        return {name: min(most[name], max(low, value + t)) for name, value in raw.items()}

    def mean(values: Mapping[str, float]) -> float:
        return math.fsum(values[name] * sizes[name] for name in raw) / total

    if len(set(raw.values())) == 1 and target <= min(
        most.values()
    ):  # equal wishes: the target itself, free of rounding
        return dict.fromkeys(raw, target)
    t = target - mean(raw)
    if abs(mean(shifted(t)) - target) < 1e-12:  # nothing was clamped
        return shifted(t)
    # Water-filling: the mean rises with t, from `low` for all to `high` for all.
    return shifted(
        bisect(
            lambda t: mean(shifted(t)) - target,
            low - max(raw.values()),
            max(most.values()) - min(raw.values()),
        )
    )


def bisect(rising: Callable[[float], float], below: float, above: float) -> float:
    """Where `rising` reaches 0 between `below` and `above`."""
    for _ in range(200):
        middle = (below + above) / 2
        if rising(middle) < 0:
            below = middle
        else:
            above = middle
    return above


def _whole(shares: Mapping[str, float], sizes: Mapping[str, int], total: int) -> Allocation:
    """Round shares to whole weights that add up to `total`, by the largest remainder."""
    ideal = {name: _snap(share * sizes[name]) for name, share in shares.items()}
    count = {name: min(sizes[name], math.floor(value)) for name, value in ideal.items()}
    missing = total - sum(count.values())
    for name in sorted(count, key=lambda name: count[name] - ideal[name])[:missing]:
        count[name] += 1
    return {name: count[name] / sizes[name] if sizes[name] else share for name, share in shares.items()}


def _snap(value: float) -> float:
    """A value that float rounding keeps a hair away from a whole number, as that number."""
    return float(round(value)) if abs(value - round(value)) < 1e-6 else value
