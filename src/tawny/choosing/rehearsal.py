"""Prune a model temporarily: walk through it as a run does, then restore its dense weights.

A search walks so to solve linears for what they would receive in a pruned model, and to prune its finalists in earnest.
What a search compares is put together from solutions that were made for the inputs of another allocation, perhaps by a
quicker solver. So what wins there need not win in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import final

from tawny.allocation.profile import Allocation
from tawny.model.streams import Samples, Stream
from tawny.progress import Progress, Silent
from tawny.pruning.block import PRUNED
from tawny.pruning.prepare import Job
from tawny.pruning.session import Session
from tawny.pruning.visitors import Solve, samples_of
from tawny.record import Record
from tawny.run.journal import Journal
from tawny.run.run import Run
from tawny.run.walk import Advance, Block, Visitor, walk
from tawny.solvers.base import Solver
from tawny.solvers.experts import ExpertSolver
from tawny.solvers.members import MemberSolver

WALK = "rehearsal"
HELD_OUT = "held_out"  # the samples that models are compared by


class _Steps(Silent):
    """Passes on the steps of a walk that is part of a longer phase."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def step(self, text: str) -> None:
        self._progress.step(f"{self._name}, {text}")

    def detail(self, text: str, done: int, total: int) -> None:
        self._progress.detail(text, done, total)


def rehearsing(
    session: Session,
    samples: Samples,
    solver: Solver | MemberSolver | ExpertSolver | None = None,
    run: Run | None = None,
) -> Session:
    """The same session with a record of its own, no output, and no refining.

    Args:
        samples: calibration tokens.
        solver: in place of the recipe's.
        run: in place of the session's.
    """
    recipe = replace(session.job.recipe, refine=replace(session.job.recipe.refine, epochs=0))
    return replace(
        session,
        job=replace(session.job, recipe=recipe, solver=solver or session.job.solver),
        samples=samples,
        run=run or session.run,
        output=None,
        record=Record(),
    )


def rehearse(
    session: Session,
    allocation: Allocation,
    samples: Samples,
    held_out: Samples,
    name: str = "finalist",
    pruning: Callable[[Session, Allocation], Visitor] = Solve,
) -> Stream:
    """`held_out` after the last block of the model that `allocation` makes of the dense one; blocks are not refined.

    Args:
        session: its stack is dense before and after.
        samples: calibration tokens.
        name: told with every step.
        pruning: what prunes each block.

    Raises:
        NumericalError: a solve or a pruned block gives NaN or infinity.
    """
    run = replace(session.run, journal=Journal(None), progress=_Steps(session.run.progress, name))
    rehearsal = rehearsing(session, samples, run=run)
    given = {**samples_of(rehearsal), HELD_OUT: held_out}
    visitors = [Restore(session.job), pruning(rehearsal, allocation), Advance(PRUNED, HELD_OUT)]
    try:
        streams = walk(run, session.job.stack, given, visitors, name=WALK, ends=[HELD_OUT], drop_outside=True)
        return streams[HELD_OUT]
    finally:
        spilled = run.spill(WALK, PRUNED)
        for left in [] if spilled is None else spilled.parent.glob(f"{spilled.name}.*"):
            left.unlink(missing_ok=True)


@final
class Restore(Visitor):
    """Gives a live model its weights back; those of a checkpoint are dropped in any case, and read anew."""

    def __init__(self, job: Job) -> None:
        self.linears = [() if job.stack.checkpoint else linears for linears in job.by_block]

    @contextmanager
    def around(self, block: Block) -> Iterator[None]:
        stack, linears = block.stack, self.linears[block.index]
        kept = [(linear, stack.stored_weight(linear), stack.bias(linear)) for linear in linears]
        try:
            yield
        finally:
            for linear, weight_OI, bias_O in kept:
                stack.set_weight(linear, weight_OI)
                if bias_O is not None:
                    stack.set_bias(linear, bias_O)

    def visit(self, block: Block) -> None:
        """The others have all changed it by then."""
