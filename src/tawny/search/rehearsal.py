"""Walk through a model as a run does, and keep nothing of it: its blocks are dense again behind it.

A search walks so to solve linears for what they would receive in a pruned model, and to prune its finalists in earnest.
What a search compares is put together from solutions that were made for the inputs of another allocation, perhaps by a
quicker solver; so what wins there need not win in a run.
"""

from __future__ import annotations

__all__ = ["Rehearsal", "dense_again", "rehearse"]

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tawny.allocation.profile import Allocation
from tawny.errors import NumericalError
from tawny.model.streams import Samples, Stream
from tawny.progress import Progress, Silent
from tawny.pruning.block import BlockRun
from tawny.pruning.demand import needs_of
from tawny.pruning.journal import Journal
from tawny.pruning.run import Run


class _Steps(Silent):
    """Passes on the steps of a walk that is part of a longer phase."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def step(self, text: str) -> None:
        self._progress.step(f"{self._name}, {text}" if self._name else text)

    def detail(self, text: str, done: int, total: int) -> None:
        self._progress.detail(text, done, total)


class Rehearsal(Run):
    """A run whose blocks are pruned as those of another one, and not refined.

    Args:
        of: the other one.
        samples: calibration tokens.
        solver: in place of the recipe's.
        name: told with every step.
    """

    def __init__(
        self, of: Run, samples: Samples, progress: Progress, solver: Any = None, name: str = ""
    ) -> None:
        recipe = of.recipe.with_overrides([("refine.epochs", 0)])
        steps = _Steps(progress, name)
        super().__init__(recipe, of.source, of.folder, of.stack, None, steps, Journal(None), of.ranks)
        self.by_block, self.placement, self.samples = of.by_block, of.placement, samples
        if solver is not None:
            self.solver, self.needs = solver, needs_of(recipe, solver)
        self.of = of

    def spill(self, walk: str, stream: str = "pruned") -> Path | None:
        return self.of.spill("rehearsal", stream)

    def blocks(self, allocation: Mapping[str, float]) -> Iterator[BlockRun]:
        try:
            yield from super().blocks(allocation)
        finally:
            spilled = self.spill(self.walk)
            for left in [] if spilled is None else spilled.parent.glob(f"{spilled.name}.*"):
                left.unlink(missing_ok=True)


def rehearse(
    run: Run, allocation: Allocation, samples: Samples, held_out: Samples, name: str = "finalist"
) -> Stream:
    """`held_out` behind the last block of the model that `allocation` makes of the dense one; blocks are not refined.

    Args:
        run: its stack is dense before and after.
        samples: calibration tokens.

    Raises:
        NumericalError: a solve or a pruned block gives NaN or infinity.
    """
    walk = Rehearsal(run, samples, run.progress, name=name)
    stream = Stream(run.stack, held_out)
    for block in walk.blocks(allocation):
        with dense_again(block):
            for stage, statistics in block.stages(walk.recipe.order):
                walk.spread(block, stage, statistics)
            block.advance()
            stream.advance(block.index)
    return stream


@contextmanager
def dense_again(block: BlockRun) -> Iterator[None]:
    """A live model gets its weights back; those of a checkpoint are dropped in any case, and read anew."""
    stack, linears = block.run.stack, block.linears
    kept = {} if stack.checkpoint else {linear.name: stack.stored_weight(linear) for linear in linears}
    try:
        yield
    except NumericalError:
        stack.release(block.index)  # the search goes on
        raise
    finally:
        for linear in linears if kept else ():
            stack.set_weight(linear, kept[linear.name])
