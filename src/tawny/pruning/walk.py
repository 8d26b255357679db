"""The walk over blocks: load each in turn, hand it out, drop it. Blocks that an earlier run has finished are skipped."""

from __future__ import annotations

__all__ = ["Commit", "solve_stage", "walk_blocks"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from tawny.calibration.observe import Stage
from tawny.calibration.statistics import Statistics
from tawny.model.streams import Stream
from tawny.pruning.block import LoadedBlock
from tawny.pruning.blocks import remove_block
from tawny.pruning.members import solve_members
from tawny.pruning.session import Session
from tawny.record import LinearRecord

# Keeps what is finished: so many blocks, and the hidden states that enter the next, by name.
Commit = Callable[[int, Mapping[str, Stream | None]], None]


def walk_blocks(
    session: Session, allocation: Mapping[str, float], walk: str, commit: Commit
) -> Iterator[LoadedBlock]:
    """Load, hand out and drop each block in turn.

    Args:
        walk: what the journal calls this walk; `commit` keeps it under that name.
    """
    job, journal, clock = session.job, session.run.journal, session.run.clock
    done, _ = journal.walk(walk)
    count = len(job.stack)
    refining = job.recipe.refine.epochs > 0
    stream: Stream | None = None
    dense: Stream | None = None
    if session.samples is not None and (job.needs != "none" or refining) and done < count:
        with clock("forward"):
            stream = _stream(session, walk, "pruned", done)
            dense = _stream(session, walk, "dense", done) if refining else None
            stream.leave_outside()
    else:
        job.stack.forget_outside()
    session.run.progress.phase("pruning", count - done)
    for index in range(done, count):
        last = index == count - 1
        with clock("read"):
            job.stack.load(index)
        yield LoadedBlock(session, index, stream, dense, allocation)
        job.stack.release(index)
        if last or journal.due():
            with clock("write"):
                commit(index + 1, {} if last else {"pruned": stream, "dense": dense})
        session.run.progress.step(job.stack.name(index))


def _stream(session: Session, walk: str, name: str, done: int) -> Stream:
    assert session.samples is not None
    saved, spill = session.run.journal.hidden(walk, name), session.run.spill(walk, name)
    return Stream(
        session.job.stack, session.run.ranks.part(session.samples), depth=done, saved=saved, spill=spill
    )


def solve_stage(block: LoadedBlock, stage: Stage, statistics: Mapping[str, Statistics]) -> None:
    """Solve every linear of a stage; of several processes each solves some, and tells the others.

    A coupling is solved by all of them, with the same numbers; so is a block that stays or leaves.
    """
    if block.job.removes_blocks:
        return remove_block(block)
    if stage.coupling is not None:
        return solve_members(block, stage.coupling, statistics)
    ranks, exact = block.session.run.ranks, block.job.needs == "hessian"
    costs = [x.numel * x.shape[1] + x.shape[1] ** 3 / 3 if exact else x.numel for x in stage.linears]
    owners = ranks.owners(costs)
    for linear, owner in zip(stage.linears, owners, strict=True):
        if owner == ranks.rank:
            block.solve(linear, statistics.get(linear.name))
    if ranks.size > 1:
        _exchange(block, stage, owners, statistics)


def _exchange(
    block: LoadedBlock, stage: Stage, owners: list[int], statistics: Mapping[str, Statistics]
) -> None:
    """Send every solved weight of a stage to all ranks, as it is stored, and put the records together."""
    session, stack = block.session, block.job.stack
    record, names = session.record, {linear.name for linear in stage.linears}
    with session.run.clock("exchange"):
        for linear, owner in zip(stage.linears, owners, strict=True):
            if owner != session.run.ranks.rank and linear.name in statistics:
                block.outliers.see([linear], {linear.name: statistics[linear.name]}, dense=False)
            stack.set_weight(linear, session.run.ranks.send(stack.stored_weight(linear), owner))
        own = [asdict(entry) for entry in record.linears if entry.name in names]
        told = session.run.ranks.all_of((own, record.warnings[block.warned :]))
    known = {entry["name"]: LinearRecord.from_dict(entry) for entries, _ in told for entry in entries}
    record.linears = [entry for entry in record.linears if entry.name not in names]
    record.linears += [known[linear.name] for linear in stage.linears]
    record.warnings[block.warned :] = sorted(line for _, lines in told for line in lines)
    block.warned = len(record.warnings)
