"""Prune a model temporarily: walk through it as a run does, then restore its dense weights.

A search walks so to solve linears for what they would receive in a pruned model, and to prune its finalists in earnest.
What a search compares is put together from solutions that were made for the inputs of another allocation, perhaps by a
quicker solver. So what wins there need not win in a run.
"""

from __future__ import annotations

__all__ = ["dense_again", "rehearse", "rehearsing"]

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tawny.allocation.profile import Allocation
from tawny.errors import NumericalError
from tawny.model.streams import Samples, Stream
from tawny.progress import Progress, Silent
from tawny.pruning.block import LoadedBlock
from tawny.pruning.session import Session
from tawny.pruning.walk import solve_stage, walk_blocks
from tawny.record import Record
from tawny.run.journal import Journal
from tawny.solvers.base import Solver
from tawny.solvers.members import MemberSolver

WALK = "rehearsal"


class _Steps(Silent):
    """Passes on the steps of a walk that is part of a longer phase."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def step(self, text: str) -> None:
        self._progress.step(f"{self._name}, {text}" if self._name else text)

    def detail(self, text: str, done: int, total: int) -> None:
        self._progress.detail(text, done, total)


def rehearsing(
    session: Session,
    samples: Samples,
    journal: Journal,
    solver: Solver | MemberSolver | None = None,
    name: str = "",
) -> Session:
    """The same session with a record of its own, no output, and no refining.

    Args:
        samples: calibration tokens.
        journal: where the walk is kept.
        solver: in place of the recipe's.
        name: told with every step.
    """
    recipe = replace(session.job.recipe, refine=replace(session.job.recipe.refine, epochs=0))
    return replace(
        session,
        job=replace(session.job, recipe=recipe, solver=solver or session.job.solver),
        run=replace(session.run, journal=journal, progress=_Steps(session.run.progress, name)),
        samples=samples,
        output=None,
        record=Record(),
    )


def rehearse(
    session: Session, allocation: Allocation, samples: Samples, held_out: Samples, name: str = "finalist"
) -> Stream:
    """`held_out` behind the last block of the model that `allocation` makes of the dense one; blocks are not refined.

    Args:
        session: its stack is dense before and after.
        samples: calibration tokens.

    Raises:
        NumericalError: a solve or a pruned block gives NaN or infinity.
    """
    rehearsal = rehearsing(session, samples, Journal(None), name=name)
    stream = Stream(session.job.stack, held_out)
    try:
        for block in walk_blocks(rehearsal, allocation, WALK, lambda blocks, streams: None):
            with dense_again(block):
                for stage, statistics in block.stages():
                    solve_stage(block, stage, statistics)
                block.advance()
                stream.advance(block.index)
    finally:
        forget_spilled(rehearsal)
    return stream


def forget_spilled(session: Session) -> None:
    """Remove the hidden states of a rehearsal that were kept on disk."""
    spilled = session.run.spill(WALK)
    for left in [] if spilled is None else spilled.parent.glob(f"{spilled.name}.*"):
        left.unlink(missing_ok=True)


@contextmanager
def dense_again(block: LoadedBlock) -> Iterator[None]:
    """A live model gets its weights back; those of a checkpoint are dropped in any case, and read anew."""
    stack, linears = block.job.stack, block.linears
    live = () if stack.checkpoint else linears
    kept = [(linear, stack.stored_weight(linear), stack.bias(linear)) for linear in live]
    try:
        yield
    except NumericalError:
        stack.release(block.index)  # the search goes on
        raise
    finally:
        for linear, weight_OI, bias_O in kept:
            stack.set_weight(linear, weight_OI)
            if bias_O is not None:
                stack.set_bias(linear, bias_O)
