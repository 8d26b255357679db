"""Move a budget around until the model is best: candidates, then budget-preserving switches (EvoPress, 2410.14649).

Everything here is a pure function of `evaluate`, the candidates, the number of trials and the seed: what a model is, this
file does not know, and its tests give it a made-up `evaluate`.

An allocation is a tuple of levels, one whole number a linear: level k means that a linear loses `target·n + k·step` of
its n weights, the steps of all linears being proportional to their sizes (or, for n:m, one n of every m). So moving a
level from one linear to another of the same size, or from one block to another of the same shape, keeps the budget to
the weight.

Scores are divergences, lower is better. Many candidates see few windows of text, the best of them more, and only the
last few all; the small samples are drawn anew in every generation, so that nothing is fitted to one of them. The end is
decided on windows that took no part: uniform against the best of what was found.
"""

from __future__ import annotations

__all__ = ["Evaluate", "Levels", "Outcome", "Proposal", "Proposals", "Space", "Trial", "make_space", "search"]

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tawny.allocation.budget import Allocation, exact
from tawny.allocation.profile import LinearInfo
from tawny.patterns import NM, Pattern

Levels = tuple[int, ...]
# Divergence of each candidate on the numbered windows. Candidates come together because they share work.
Evaluate = Callable[[Sequence[Levels], Sequence[int]], Sequence[float]]
_HIGHEST = 0.99  # sparsity of the last level; a linear without weights is not worth a solution


@dataclass(frozen=True)
class Space:
    """The linears of a model and the levels they can have.

    Attributes:
        linears: in model order.
        target: sparsity at level 0.
        steps: what one level of each linear is worth, in weights.
        low, high: the levels there are, of every linear; `low ≤ 0 ≤ high`.
        pattern: n:m levels are whole steps of n.
    """

    linears: tuple[LinearInfo, ...]
    target: float
    steps: tuple[int, ...]
    low: int
    high: int
    pattern: Pattern

    @property
    def uniform(self) -> Levels:
        return (0,) * len(self.linears)

    @property
    def levels(self) -> range:
        return range(self.low, self.high + 1)

    def sparsity(self, index: int, level: int) -> float:
        """Of one linear at one level."""
        if isinstance(self.pattern, NM):
            return 1.0 - (self.pattern.n - level) / self.pattern.m
        numel = self.linears[index].numel
        return min(1.0, max(0.0, self.target + level * self.steps[index] / numel))

    def excess(self, levels: Levels) -> int:
        """Weights that are removed beyond the budget."""
        return sum(level * step for level, step in zip(levels, self.steps, strict=True))

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
        """Move the levels that are cheapest to move until the budget is met, or cannot be met more closely."""
        excess = self.excess(tuple(levels))
        while excess:
            move = -1 if excess > 0 else 1
            legal = [
                (abs(level + move - wish) - abs(level - wish), i)
                for i, (level, wish) in enumerate(zip(levels, wishes, strict=True))
                if self.low <= level + move <= self.high and abs(excess + move * self.steps[i]) < abs(excess)
            ]
            if not legal:
                break
            _, chosen = min(legal)
            levels[chosen] += move
            excess += move * self.steps[chosen]
        return tuple(levels)

    def mutated(self, levels: Levels, chance: random.Random) -> Levels:
        """A few switches of one level each; few are likelier than many."""
        made = list(levels)
        for _ in range(min(chance.randint(1, 3), chance.randint(1, 3))):
            switch = chance.choice((self._switch_blocks, self._switch_linears))
            for _ in range(20):  # a place at its last level cannot give or take
                if switch(made, chance):
                    break
        return tuple(made)

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


def make_space(
    linears: tuple[LinearInfo, ...], pattern: Pattern, target: float, levels: int, step: float | None = None
) -> Space:
    """As many levels as asked for, half of them on each side of the target, where they fit.

    Args:
        levels: an odd number.
        step: share of the weights between two levels; None spreads them over half of the way to 0 or 1, whichever is
            nearer, as EvoPress does. n:m has its own steps.
    """
    half = levels // 2
    if isinstance(pattern, NM):
        steps = tuple(x.numel // pattern.m for x in linears)
        return Space(
            linears,
            pattern.sparsity,
            steps,
            -min(half, pattern.m - pattern.n),
            min(half, pattern.n - 1),
            pattern,
        )
    wanted = 0.5 * min(target, 1 - target) / half if step is None else step
    common = math.gcd(*(x.numel for x in linears)) or 1
    if wanted * common >= 1:  # steps in proportion to sizes, so that sums of them can cancel
        steps = tuple(round(wanted * common) * (x.numel // common) for x in linears)
    else:
        steps = tuple(max(1, round(wanted * x.numel)) for x in linears)
    widest = max((s / x.numel for s, x in zip(steps, linears, strict=True)), default=1.0)
    low = -min(half, int(target / widest + 1e-9)) if wanted else 0
    high = min(half, max(0, int((_HIGHEST - target) / widest + 1e-9))) if wanted else 0
    return Space(linears, target, steps, low, high, pattern)


@dataclass(frozen=True)
class Proposal:
    """Something to try: an allocation with a name, and a token its proposer knows it by."""

    name: str
    allocation: Allocation
    token: Any = None


class Proposals(Protocol):
    """Where the first candidates come from."""

    def ask(self, count: int) -> list[Proposal]:
        """At most `count` proposals; none when there are no more."""
        ...

    def of_others(self) -> list[Proposal]:
        """What others, who look for the same, found best so far."""
        ...

    def tell(self, proposal: Proposal, score: float) -> None:
        """How it did on the first windows."""
        ...


@dataclass
class Trial:
    """One allocation that was tried.

    Attributes:
        score: divergence on the most windows it was given.
        windows: how many these were.
        verdict: divergence on the windows that decide, for the few that came so far.
        origin: name of the proposal it goes back to, "" for a proposal.
        depth: how many generations of switches lie between.
    """

    name: str
    levels: Levels
    score: float
    windows: int
    verdict: float | None = None
    origin: str = ""
    depth: int = 0
    allocation: Allocation | None = None


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        winner: the best on the deciding windows.
        uniform: the baseline, scored as finely.
        best_proposal: the best that was proposed and not refined.
        trials: everything tried, in order.
        generations: score of the parent after each generation.
        cut_short: why not all trials were made, or "".
    """

    winner: Trial
    uniform: Trial
    best_proposal: Trial
    trials: list[Trial]
    generations: list[float] = field(default_factory=list)
    cut_short: str = ""

    @property
    def margin(self) -> float:
        """How much lower the winner's divergence is than uniform's, as a share of it."""
        base, best = _verdict(self.uniform), _verdict(self.winner)
        if not math.isfinite(base):
            return float(math.isfinite(best))
        return (base - best) / base if base > 0 else 0.0


def search(
    space: Space,
    proposals: Proposals,
    evaluate: Evaluate,
    *,
    trials: int,
    offspring: int,
    windows: Sequence[int],
    deciding: Sequence[int],
    seed: int = 0,
    stopped: Callable[[], str] = lambda: "",
    step: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Try `trials` allocations and keep the best.

    Args:
        proposals: tried first, at most two thirds of all trials; uniform is always tried before them.
        evaluate: scores candidates on windows.
        windows: numbers of the windows to search on.
        deciding: numbers of others, for the last word.
        stopped: says why to stop early; asked between rounds, never before the first.
        step: told after each round.
    """
    hunt = _Hunt(space, evaluate, random.Random(seed), list(windows), offspring, step)
    uniform = Trial("uniform", space.uniform, math.inf, 0, allocation=space.allocation(space.uniform))
    hunt.known[space.uniform] = uniform
    hunt.score([uniform], hunt.few())
    cut = hunt.propose(proposals, min(max(1, trials * 2 // 3), trials - 1), stopped)
    first = hunt.finalists(uniform)
    generations: list[float] = []
    parent = first[0]
    while not cut and len(hunt.known) < trials and space.low < space.high:
        cut = stopped()
        if cut:
            break
        found = hunt.generation(parent, min(offspring, trials - len(hunt.known)))
        if found is None:  # nothing new is within reach
            break
        parent = min(found, parent, key=lambda trial: trial.score)
        generations.append(parent.score)
        step(f"best {parent.score:.4f}, uniform {uniform.score:.4f}")
    last = list({id(trial): trial for trial in (uniform, *first[:3], parent)}.values())
    for trial, score in zip(last, evaluate([t.levels for t in last], list(deciding)), strict=True):
        trial.verdict = _finite(score)
    best = [trial for trial in last if not trial.origin]
    step("decided")
    return Outcome(
        winner=min(last, key=_verdict),  # the first of equals: uniform
        uniform=uniform,
        best_proposal=min(best, key=_verdict),
        trials=list(hunt.known.values()),
        generations=generations,
        cut_short=f"{cut} after {len(hunt.known)} of {trials} trials" if cut else "",
    )


def _verdict(trial: Trial) -> float:
    return math.inf if trial.verdict is None else trial.verdict


def _finite(score: float) -> float:
    return float(score) if math.isfinite(score) else math.inf


@dataclass
class _Hunt:
    """The state of one search: what is known, and the chance that everything is drawn from."""

    space: Space
    evaluate: Evaluate
    chance: random.Random
    windows: list[int]
    offspring: int
    step: Callable[[str], None]
    known: dict[Levels, Trial] = field(default_factory=dict)

    def few(self) -> list[int]:
        """The windows of the first round: a quarter."""
        return self.windows[: max(1, len(self.windows) // 4)]

    def score(self, batch: Sequence[Trial], windows: Sequence[int]) -> None:
        """Score each on these windows, unless that many have been seen already."""
        new = list({trial.levels: trial for trial in batch if trial.windows < len(windows)}.values())
        scores = self.evaluate([trial.levels for trial in new], list(windows)) if new else []
        for trial, score in zip(new, scores, strict=True):
            trial.score, trial.windows = _finite(score), len(windows)

    def propose(self, proposals: Proposals, most: int, stopped: Callable[[], str]) -> str:
        """Try what is proposed, in rounds, each score being told before the next round is asked for."""
        asked, over = 0, False
        while not over:
            batch = proposals.ask(min(self.offspring, most - asked)) if asked < most else []
            asked += len(batch)
            over = not batch or asked >= most
            if over and most:
                batch += proposals.of_others()
            if not batch:
                break
            made = []
            for proposal in batch:
                levels = self.space.nearest(proposal.allocation)
                if levels not in self.known:
                    self.known[levels] = Trial(
                        proposal.name, levels, math.inf, 0, allocation=proposal.allocation
                    )
                made.append(self.known[levels])
            self.score(made, self.few())
            for proposal, trial in zip(batch, made, strict=True):
                proposals.tell(proposal, trial.score)
            best = min(self.known.values(), key=lambda trial: trial.score)
            self.step(f"best {best.score:.4f}, {best.name}")
            reason = stopped()
            if reason:
                return reason
        return ""

    def finalists(self, uniform: Trial) -> list[Trial]:
        """The best of the proposals on all windows, best first; uniform is always scored as finely."""
        ranked = sorted(self.known.values(), key=lambda trial: trial.score)
        half = ranked[: max(4, len(ranked) // 4)]
        self.score(half, self.windows[: max(1, len(self.windows) // 2)])
        half.sort(key=lambda trial: trial.score)
        last = half[:4] if uniform in half[:4] else [*half[:4], uniform]
        self.score(last, self.windows)
        return sorted(last, key=lambda trial: trial.score)

    def generation(self, parent: Trial, count: int) -> Trial | None:
        """The best of `count` new children on all windows; None if there is nothing new to try."""
        children: list[Trial] = []
        for _ in range(50 * count):
            levels = self.space.mutated(parent.levels, self.chance)
            if levels not in self.known and len(children) < count:
                child = Trial(
                    f"switched {len(self.known)}",
                    levels,
                    math.inf,
                    0,
                    origin=parent.origin or parent.name,
                    depth=parent.depth + 1,
                )
                self.known[levels] = child
                children.append(child)
        if not children:
            return None
        total = len(self.windows)
        for share, keep in ((4, max(1, count // 4)), (2, max(1, count // 8))):
            sample = sorted(self.chance.sample(self.windows, max(1, total // share)))
            for child in children:
                child.windows = 0
            self.score(children, sample)
            children = sorted(children, key=lambda trial: trial.score)[:keep]
        for child in children:
            child.windows = 0
        self.score(children, self.windows)
        return min(children, key=lambda trial: trial.score)
