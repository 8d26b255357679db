"""`tawny fit --budget 20m`: the bits that were chosen are moved about while the measured divergence falls.

A choice from single measurements takes errors to add up. Here they need not. One walk solves each linear at its kind and at
the two kinds beside it, after blocks that are rounded as chosen (solving.py). Then a linear gains bits and others lose some,
within what may be spent (kind_space.py), and the models are compared by their divergence (evolution.py, divergence.py). Time
ends it, so another run may try more or less; what was tried is journalled, and a fit that goes on repeats none of it and decides
as one that never stopped. The result is one more finalist. Held-out text decides, as between the others.
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tawny.choosing.demand import TOGETHER
from tawny.choosing.divergence import Scorer
from tawny.choosing.evolution import evolve
from tawny.choosing.kind_space import make_kind_space
from tawny.choosing.level import Level
from tawny.choosing.scores import Scores
from tawny.choosing.solving import LevelStore, level_dtype, solve_levels
from tawny.choosing.table import Finalist, Table
from tawny.errors import NumericalError
from tawny.model.streams import Samples
from tawny.pruning.session import Session
from tawny.words import duration

WALK = "refining"  # what the journal calls it
_NAME = "bits by the linear, refined by KL"
_TRIALS = 1_000_000  # time ends it


def refine(
    session: Session, table: Table, seconds: float, samples: Samples, searched: Samples, work: Path
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
    moving = partial(_refined, session, table, start, seconds, samples, searched, work)
    outcome = journal.once("refined", moving)
    journal.forget(WALK)
    shutil.rmtree(work / "levels", ignore_errors=True)  # a fit that is stopped before this goes on
    if outcome["kinds"] is None:
        return None, outcome
    levels = {name: Level(0.0, kind) for name, kind in outcome["kinds"].items()}
    return table.finalist(_NAME, levels, None, start.head, embedding=start.embedding), outcome


def _refined(
    session: Session,
    table: Table,
    start: Finalist,
    seconds: float,
    samples: Samples,
    searched: Samples,
    work: Path,
) -> dict[str, Any]:
    journal, dtype = session.run.journal, level_dtype(session.job.stack)
    space = make_kind_space(table, start)
    store = LevelStore(work / "levels", space.bytes_in(dtype), dtype, kept=journal.walk(WALK)[0])
    clock = _Deadline(session, seconds)
    try:
        with store:
            solved = solve_levels(
                session, space, store, samples=samples, held_out=searched, name=WALK, note=clock.note
            )
            scores = Scores(store.folder / "scores.jsonl")
            scorer = Scorer(session.job, store, searched, solved.hidden, session.run.progress, scores)
            session.run.progress.phase("refining by measured KL", 100, "percent of its time")

            def step(_: str) -> None:
                part = min(1.0, clock.elapsed / seconds) if seconds else 1.0
                session.run.progress.at(math.floor(100 * part), max(0.0, seconds - clock.elapsed))

            windows = range(len(searched))
            outcome = evolve(
                space,
                iter(()),
                scorer,
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
    before, after = outcome.uniform.last_word, outcome.winner.last_word
    tried = len(outcome.trials) - 1
    says = f"refined for {duration(clock.elapsed)}: {tried} models tried, KL {before:.4f} → {after:.4f} on windows searched on"
    kinds = None
    if outcome.winner.levels != space.uniform:
        kinds = {
            x.name: space.level(i, number).kind
            for i, (x, number) in enumerate(zip(table.linears, outcome.winner.levels, strict=True))
        }
    return {
        "kinds": kinds,
        "before": before,
        "after": after,
        "tried": tried,
        "seconds": clock.elapsed,
        "says": says,
    }


class _Deadline:
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
