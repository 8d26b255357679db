"""Move a budget around until the model is best: candidates, then budget-preserving switches (EvoPress, 2410.14649).

Everything here is a pure function of the space, the candidates, `evaluate`, the number of trials and the seed. This file does
not know what a model is, nor what a level means. Its tests give it a made-up `evaluate`.

Scores are divergences, lower is better. Many candidates see few windows of text, the best of them more, and only the
last few all; the small samples are drawn anew in every generation, so that nothing is fitted to one of them. The end is
decided on windows that took no part: uniform against the best of what was found.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tawny.allocation.profile import Allocation
from tawny.choosing.space import Levels, Space

# Divergence of each candidate on the numbered windows. Candidates come together because they share work.
Evaluate = Callable[[Sequence[Levels], Sequence[int]], Sequence[float]]
# The same of models that are pruned in earnest, one when it is asked for.
Prove = Callable[[Sequence[Allocation], Sequence[int]], Iterator[float]]


@dataclass(frozen=True)
class Proposal:
    """Something to try first: an allocation with a name."""

    name: str
    allocation: Allocation


@dataclass
class Trial:
    """One allocation that was tried.

    Attributes:
        score: divergence on the most windows it was given.
        windows: how many these were.
        verdict: divergence on windows that decide, for the few that came so far.
        proof: divergence on all windows that decide of the model that was really pruned so, for the finalists.
        origin: name of the proposal it goes back to, "" for a proposal.
        depth: how many generations of switches lie between.
    """

    name: str
    levels: Levels
    score: float
    windows: int
    verdict: float | None = None
    proof: float | None = None
    origin: str = ""
    depth: int = 0
    allocation: Allocation | None = None

    @property
    def last_word(self) -> float:
        """The proof where there is one, else the verdict; infinite without either."""
        score = self.verdict if self.proof is None else self.proof
        return math.inf if score is None else score


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        winner: the best on the deciding windows, of those with a proof if there are any.
        uniform: the baseline, scored as finely.
        trials: everything tried, in order.
        generations: score of the parent after each generation.
        cut_short: why not all trials were made, or "".
    """

    winner: Trial
    uniform: Trial
    trials: list[Trial]
    generations: list[float] = field(default_factory=list)
    cut_short: str = ""

    @property
    def margin(self) -> float:
        """How much lower the winner's divergence is than uniform's, as a share of it."""
        base, best = self.uniform.last_word, self.winner.last_word
        if not math.isfinite(base):
            return float(math.isfinite(best))
        return (base - best) / base if base > 0 else 0.0


def evolve(
    space: Space,
    proposals: Iterator[Proposal],
    evaluate: Evaluate,
    *,
    trials: int,
    offspring: int,
    windows: Sequence[int],
    deciding: Sequence[int],
    seed: int = 0,
    stopped: Callable[[], str] = lambda: "",
    step: Callable[[str], None] = lambda text: None,
    prove: Prove | None = None,
    finalists: int = 0,
) -> Outcome:
    """Try `trials` allocations and keep the best.

    Args:
        proposals: tried first, at most two thirds of all trials; uniform is always tried before them.
        evaluate: scores candidates on windows.
        windows: numbers of the windows to search on.
        deciding: numbers of others, for the last word; where models are proven, candidates for that are chosen on as many
            of these as there are `windows`.
        stopped: says why to stop early; asked between rounds, never before the first.
        step: told after each round.
        prove: prunes in earnest. Without it the deciding windows have the last word on what `evaluate` compares.
        finalists: how many of the best are proven, beside uniform.
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
        child = hunt.generation(parent, min(offspring, trials - len(hunt.known)))
        if child is None:  # nothing new is within reach
            break
        parent = min(child, parent, key=lambda trial: trial.score)
        generations.append(parent.score)
        step(f"best {parent.score:.4f}, uniform {uniform.score:.4f}")
    last = list({id(trial): trial for trial in (uniform, *first[:3], parent)}.values())
    proving = prove is not None and finalists > 0 and not cut
    ranking = list(deciding[: len(windows)] if proving else deciding)
    for trial, score in zip(last, evaluate([t.levels for t in last], ranking), strict=True):
        trial.verdict = _finite(score)
    step("decided")
    cut_short = f"{cut} after {len(hunt.known)} of {trials} trials" if cut else ""
    if prove is not None and proving and len(last) > 1:
        ranked = sorted(last[1:], key=lambda trial: trial.last_word)
        last = [uniform, *ranked[:finalists]]
        cut = hunt.prove(last, prove, list(deciding), stopped)
        cut_short = f"{cut} before its finalists were pruned" if cut else ""
    return Outcome(
        winner=min(last, key=lambda trial: trial.last_word),  # the first of equals: uniform
        uniform=uniform,
        trials=list(hunt.known.values()),
        generations=generations,
        cut_short=cut_short,
    )


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

    def propose(self, proposals: Iterator[Proposal], most: int, stopped: Callable[[], str]) -> str:
        """Try at most so many of what is proposed, in rounds; why that was stopped, or ""."""
        proposals = islice(proposals, most)
        while batch := list(islice(proposals, self.offspring)):
            trials = []
            for proposal in batch:
                levels = self.space.nearest(proposal.allocation)
                new = Trial(proposal.name, levels, math.inf, 0, allocation=proposal.allocation)
                trials.append(self.known.setdefault(levels, new))
            self.score(trials, self.few())
            best = min(self.known.values(), key=lambda trial: trial.score)
            self.step(f"best {best.score:.4f}, {best.name}")
            if reason := stopped():
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

    def prove(
        self, last: Sequence[Trial], prove: Prove, deciding: Sequence[int], stopped: Callable[[], str]
    ) -> str:
        """Give each its proof, or none of them where time is over before: they could not be compared. Says so."""
        proofs = prove([t.allocation or self.space.allocation(t.levels) for t in last], deciding)
        for trial in last:
            reason = stopped()
            if reason:
                for each in last:
                    each.proof = None
                return reason
            trial.proof = _finite(next(proofs))
        return ""

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
