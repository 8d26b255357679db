"""`tawny fit --budget 20m`: the bits that were chosen are moved about while the measured divergence falls.

A choice from single measurements takes errors to add up. Here they need not. One walk solves each linear at its kind and at
the two kinds beside it, behind blocks that are rounded as chosen. Then a linear gains bits and others lose some, within what may
be spent, and the models are compared by their divergence (evolution.py, divergence.py). Time ends it, so another run may try
more or less; what was tried is journalled, and a fit that goes on repeats none of it and decides as one that never stopped.
The result is one more finalist. Held-out text decides, as between the others.
"""

from __future__ import annotations

__all__ = ["Moves", "refine"]

import math
import random
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tawny.allocation.profile import Allocation
from tawny.choosing.demand import TOGETHER
from tawny.choosing.divergence import Divergence
from tawny.choosing.evolution import evolve
from tawny.choosing.level import KINDS_TRIED, Level
from tawny.choosing.rehearsal import rehearsing
from tawny.choosing.scores import Measured
from tawny.choosing.solving import LevelStore, key_of
from tawny.choosing.space import Levels
from tawny.choosing.table import Finalist, Table
from tawny.errors import NumericalError
from tawny.model.durable import writing
from tawny.model.streams import Samples, Stream
from tawny.model.tensorfile import TensorWriter
from tawny.pruning.session import Session
from tawny.pruning.walk import walk_blocks
from tawny.words import duration

WALK = "refining"  # what the journal calls it
_NAME = "bits by the linear, refined by KL"
_TRIALS = 1_000_000  # time ends it
_TRIES = 50


def refine(
    session: Session,
    table: Table,
    seconds: float,
    samples: Samples,
    searched: Samples,
    dtype: torch.dtype,
    work: Path,
) -> tuple[Finalist | None, dict[str, Any]]:
    """A finalist that is nearer to the dense model on the windows that are searched on; None where nothing was.

    Args:
        seconds: of the walk and the trials together; a round that has begun is finished.
        searched: windows to compare models on; they do not decide.
        work: where the solutions are kept meanwhile.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    start = table.chosen(table.room.budget, _NAME, zeros=False)
    if start is None:  # only zeros are small enough
        return None, {"says": "nothing to refine: only zeros make the model that small"}
    journal = session.run.journal
    told = journal.once(
        "refined", partial(_refined, session, table, start, seconds, samples, searched, dtype, work)
    )
    journal.forget(WALK)
    shutil.rmtree(work / "levels", ignore_errors=True)  # a fit that is stopped before this goes on
    if told["kinds"] is None:
        return None, told
    levels = {name: Level(0.0, kind) for name, kind in told["kinds"].items()}
    return table.finalist(_NAME, levels, None, start.head, embedding=start.embedding), told


def _refined(
    session: Session,
    table: Table,
    start: Finalist,
    seconds: float,
    samples: Samples,
    searched: Samples,
    dtype: torch.dtype,
    work: Path,
) -> dict[str, Any]:
    journal = session.run.journal
    moves = Moves(table, start)
    count = sum(len(each) for each in moves.allowed)
    size = sum(x.numel * len(each) for x, each in zip(table.linears, moves.allowed, strict=True))
    store = LevelStore(work / "levels", size * dtype.itemsize, dtype, kept=journal.walk(WALK)[0])
    clock = _Clock(session, seconds)
    try:
        hidden = _solve(session, moves, store, samples, searched, clock, count)
        measured = Measured(store.folder / "scores.jsonl")
        divergence = Divergence(session.job, store, searched, hidden, session.run.progress, measured)
        session.run.progress.phase("refining by measured KL", 100, "percent of its time")

        def step(_: str) -> None:
            part = min(1.0, clock.elapsed / seconds) if seconds else 1.0
            session.run.progress.at(math.floor(100 * part), max(0.0, seconds - clock.elapsed))

        windows = range(len(searched))
        outcome = evolve(
            moves,
            iter(()),
            divergence,
            trials=_TRIALS,
            offspring=TOGETHER,
            windows=windows,
            deciding=windows,
            seed=session.job.recipe.seed,
            stopped=clock.stopped,
            step=step,
        )
    except NumericalError:  # goes on without, and no other walk would clear this one
        journal.forget(WALK)
        store.remove()
        raise
    finally:
        store.close()
    before, after = outcome.uniform.last_word, outcome.winner.last_word
    tried = len(outcome.trials) - 1
    says = f"refined for {duration(clock.elapsed)}: {tried} models tried, KL {before:.4f} → {after:.4f} on windows searched on"
    kinds = None
    if outcome.winner.levels != moves.uniform:
        kinds = {
            x.name: KINDS_TRIED[level - 1]
            for x, level in zip(table.linears, outcome.winner.levels, strict=True)
        }
    return {
        "kinds": kinds,
        "before": before,
        "after": after,
        "tried": tried,
        "seconds": clock.elapsed,
        "says": says,
    }


class _Clock:
    """Says when time is over. A round that was begun is made, also by a run that goes on."""

    def __init__(self, session: Session, seconds: float) -> None:
        self._run, self._most = session.run, seconds
        kept = self._run.journal.state.setdefault(WALK, {"seconds": 0.0, "rounds": 0})
        self._before, self._rounds = float(kept["seconds"]), int(kept["rounds"])
        self._begun, self._asked = self._run.clock.elapsed, 0

    @property
    def elapsed(self) -> float:
        return self._before + self._run.clock.elapsed - self._begun

    def note(self) -> None:
        """Into the journal, which whoever calls this writes."""
        self._run.journal.state[WALK] = {"seconds": self.elapsed, "rounds": self._rounds}

    def stopped(self) -> str:
        """Asked before each round."""
        if self._asked >= self._rounds:
            if self.elapsed >= self._most:
                return "time was over"
            self._rounds += 1
            self.note()
            self._run.journal.save()
        self._asked += 1
        return ""


def _solve(
    session: Session,
    moves: Moves,
    store: LevelStore,
    samples: Samples,
    searched: Samples,
    clock: _Clock,
    count: int,
) -> torch.Tensor:
    """Every linear at the kinds that it may get, into the store; the dense model's last hidden states."""
    journal, stack = session.run.journal, session.job.stack
    done, _ = journal.walk(WALK)
    rehearsal = rehearsing(session, samples, journal)
    dense = Stream(stack, searched, depth=done, saved=journal.hidden(WALK, "held_out"))

    def commit(blocks: int, streams: Mapping[str, Stream | None]) -> None:
        store.settle(blocks)
        session.note_cost()
        clock.note()
        journal.commit(WALK, blocks, {}, {**streams, "held_out": dense})

    session.run.progress.phase(f"solving at {count} kinds", len(stack) - done)
    zeros = dict.fromkeys((x.name for x in session.job.linears), 0.0)
    for block in walk_blocks(rehearsal, zeros, WALK, commit):
        dense.advance(block.index)
        path = store.path(block.index)
        wanted = {x.name: moves.of(x.name) for x in block.linears}
        specs = {key_of(x, level): (store.dtype, x.shape) for x in block.linears for level in wanted[x.name]}
        with writing(path), TensorWriter(path, specs) as writer:
            for stage, statistics in block.stages():
                for linear in stage.linears:
                    W_OI = stack.weight(linear)
                    known = block.known(linear, statistics.get(linear.name))
                    for level in wanted[linear.name]:
                        rehearsal.record.values[linear.name] = KINDS_TRIED[level - 1]
                        solution, _, _ = block.solution(linear, W_OI, known, 0.0)
                        writer.write(key_of(linear, level), solution.weight.to(store.dtype).cpu())
                        if level == moves.start[linear.name]:
                            stack.set_weight(linear, solution.weight)
        block.advance()
    return torch.cat(list(dense.hidden))


class Moves:
    """Level k is the k-th kind that is tried, from 1; each linear may move to the kinds beside the one that was chosen."""

    low, high = 0, len(KINDS_TRIED)

    def __init__(self, table: Table, start: Finalist) -> None:
        names = [x.name for x in table.linears]
        chosen = [1 + KINDS_TRIED.index(start.levels[name].kind) for name in names]
        every = {(level.kind, level.sparsity): i for i, level in enumerate(table.every)}
        self.uniform: Levels = tuple(chosen)
        self.start = dict(zip(names, chosen, strict=True))
        self.allowed = [
            tuple(level for level in (each - 1, each, each + 1) if 1 <= level <= len(KINDS_TRIED))
            for each in chosen
        ]
        self._of = dict(zip(names, self.allowed, strict=True))
        self._takes = [
            {level: takes[every[KINDS_TRIED[level - 1], 0.0]] for level in allowed}
            for takes, allowed in zip(table.takes, self.allowed, strict=True)
        ]
        self._room = table.room.budget - table.limit.rest - table.limit.of_head(start.head)
        self._room -= table.limit.of_embedding(start.embedding or start.head)

    def of(self, name: str) -> tuple[int, ...]:
        return self._of[name]

    def allocation(self, levels: Levels) -> Allocation:
        """Nothing is removed."""
        return {}

    def nearest(self, allocation: Allocation) -> Levels:
        return self.uniform

    def mutated(self, levels: Levels, chance: random.Random) -> Levels:
        """One to three linears gain bits, and others lose some until the model fits."""
        made = list(levels)
        for _ in range(chance.randint(1, 3)):
            gaining = [i for i, level in enumerate(made) if level - 1 in self._takes[i]]
            if gaining:
                made[chance.choice(gaining)] -= 1
        for _ in range(_TRIES):
            if sum(takes[level] for takes, level in zip(self._takes, made, strict=True)) <= self._room:
                return tuple(made)
            losing = [i for i, level in enumerate(made) if level + 1 in self._takes[i]]
            if not losing:
                break
            made[chance.choice(losing)] += 1
        return levels
