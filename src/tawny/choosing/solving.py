"""Solutions of every linear at every level, kept on disk.

One walk through the model solves each linear at each level with the recipe's solver or what stands in for it. It also keeps
what candidates want to know of the dense model, and the dense model's last hidden states. A linear is solved for what
it would receive in a model that is pruned uniformly so far. Solutions for dense inputs do not make up for what is lost
before them, and a model that is put together from such solutions says little of a pruned one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import torch
from torch import Tensor

from tawny.allocation.joint import Survey
from tawny.allocation.profile import Profile
from tawny.calibration.observe import Stage
from tawny.calibration.statistics import Statistics
from tawny.choosing.level import Level
from tawny.choosing.rehearsal import HELD_OUT, Restore, rehearsing
from tawny.choosing.space import Levels, Space
from tawny.errors import OutputError
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.model.tensorfile import TensorEntry, TensorWriter, entries, free_bytes, read_tensor
from tawny.pruning.block import PRUNED, PrunedBlock
from tawny.pruning.members import seen_by, without_members
from tawny.pruning.prepare import profile_count
from tawny.pruning.profiling import PROFILED, Profiling
from tawny.pruning.session import Session
from tawny.pruning.visitors import samples_of
from tawny.run.walk import Advance, Block, Visitor, walk
from tawny.solvers.base import Solver
from tawny.solvers.experts import ExpertSolver
from tawny.solvers.members import MemberSolver

WALK = "levels"  # what the journal calls it
_Solution = tuple[Linear, int, Tensor]  # a linear, a level, its weight [out, in]


class LevelStore:
    """One file a block in `folder`.

    Args:
        size: bytes that all solutions take.
        kept: of how many blocks the solutions are there already; whatever else is in the folder goes, unless there are any.

    Raises:
        OutputError: the disk has not enough room, or what is said to be there is not.
    """

    def __init__(self, folder: Path, size: int, dtype: torch.dtype, *, kept: int = 0) -> None:
        self.folder, self.dtype, self.bytes = folder, dtype, size
        self._settled = kept  # blocks whose files a power cut does not lose
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        there = 0
        for path in map(self.path, range(kept)):
            if not path.is_file():
                raise OutputError(
                    f"{path}, which an unfinished search goes on from, is missing; put it back, or remove "
                    f"{folder.parent} to start over"
                )
            there += sum(entry.bytes for entry in entries(path).values())
        for path in folder.glob("*.safetensors"):  # written after what is known of them, and written again
            if int(path.stem) >= kept:
                path.unlink()
        free = free_bytes(folder)
        if free < self.bytes - there:
            if not kept:
                self.remove()
            raise OutputError(
                f"the solutions a search compares take {(self.bytes - there) / 1e9:.1f} GB, and {folder.parent} has "
                f"{free / 1e9:.1f} GB free: choose another place, or fewer search.levels in a search"
            )
        self._file: IO[bytes] | None = None
        self._entries: dict[str, TensorEntry] = {}

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def settle(self, blocks: int) -> None:
        """Let the files of the first `blocks` blocks survive a power cut."""
        for path in map(self.path, range(self._settled, blocks)):
            with writing(path):
                durable.sync(path)
        self._settled = blocks

    def open(self, index: int) -> None:
        """Turn to the file of one block."""
        self._turn()
        if self.path(index).is_file():
            self._entries = entries(self.path(index))
            self._file = self.path(index).open("rb")

    def read(self, linear: Linear, level: int) -> Tensor | None:
        """`[out, in]`, or None where the level changes nothing."""
        entry = self._entries.get(key_of(linear, level))
        return None if entry is None or self._file is None else read_tensor(self._file, entry)

    @contextmanager
    def of_block(
        self, stack: Stack, index: int, linears: Sequence[Linear]
    ) -> Iterator[Callable[[Levels], AbstractContextManager[None]]]:
        """Inside, what was given sets the linears of the loaded block to solutions of some levels; it is dense again afterwards."""
        self.open(index)
        now: list[int | None] = [None] * len(linears)
        views = [linear.view(getattr(linear.module, linear.parameter).data) for linear in linears]
        dense = [view.clone() for view in views]

        def at(levels: Levels) -> AbstractContextManager[None]:
            for place, (linear, level) in enumerate(zip(linears, levels, strict=True)):
                if now[place] != level:
                    solved = self.read(linear, level)
                    views[place].copy_(dense[place] if solved is None else solved)
                    now[place] = level
            return nullcontext()

        try:
            yield at
        finally:
            if stack.checkpoint is None:  # a live model goes on being used
                for view, before in zip(views, dense, strict=True):
                    view.copy_(before)

    def _turn(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._entries = None, {}

    def __enter__(self) -> LevelStore:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the files."""
        self._turn()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def key_of(linear: Linear, level: int) -> str:
    return f"{linear.name}@{level}"


@dataclass
class Solved:
    """What the walk leaves behind beside the store.

    Attributes:
        profile: measures of every block, for the candidates.
        hidden: `[windows, tokens, hidden]` of the dense model after its last block.
        warnings: linears that saw no token.
    """

    profile: Profile
    hidden: Tensor
    warnings: list[str]


@dataclass(frozen=True)
class _Wanted:
    """Of the linears, by name: the levels to solve, by number, and the one that the block is left at."""

    levels: Mapping[str, Mapping[int, Level]]
    left: Mapping[str, int]

    @classmethod
    def of(cls, space: Space) -> _Wanted:
        places = list(enumerate(space.linears))
        return cls(
            {
                x.name: {k: space.level(i, k) for k in space.levels_of(i) if space.changes(i, k)}
                for i, x in places
            },
            {x.name: number for (_, x), number in zip(places, space.uniform, strict=True)},
        )


def solve_levels(
    session: Session,
    space: Space,
    store: LevelStore,
    *,
    samples: Samples,
    held_out: Samples,
    solver: Solver | MemberSolver | ExpertSolver | None = None,
    survey: Survey | None = None,
) -> Solved:
    """Walk through the model once, after blocks that are solved at the levels of `space.uniform`.

    Args:
        session: its stack is dense before and after; finished blocks are in its journal.
        space: the levels to solve each linear at; its linears are those of the session, in order.
        samples: calibration tokens for statistics.
        held_out: windows to compare models on.
        solver: in place of the recipe's, a quicker one.
        survey: what candidates want to know of the dense model, on as many samples as an allocator alone would see.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    rehearsal = rehearsing(session, samples, solver)
    solving = _SolveLevels(rehearsal, space, store)
    return walk_dense(session, rehearsal, solving, held_out, survey, name=WALK, phase="solving at each level")


def walk_dense(
    session: Session,
    rehearsal: Session,
    visitor: Visitor,
    held_out: Samples,
    survey: Survey | None,
    *,
    name: str,
    phase: str,
) -> Solved:
    """Let `visitor` see every block on the samples of the rehearsal, and leave it as it is to be for the next one.

    Held-out windows go through the dense blocks beside it, and candidates measure what they want to know there.
    """
    job, samples = session.job, rehearsal.samples
    assert samples is not None
    given = {**samples_of(rehearsal), HELD_OUT: held_out}
    profiling = None if survey is None else Profiling(job, survey, session.factors)
    if survey is not None and survey.needs != "none":
        given[PROFILED] = samples.first(profile_count(job.recipe, len(samples), samples.seqlen))
    visitors: list[Visitor] = [Restore(job), Advance(HELD_OUT), *([] if profiling is None else [profiling])]
    visitors += [visitor, Advance(PRUNED)]
    streams = walk(
        session.run,
        job.stack,
        given,
        visitors,
        name=name,
        phase=phase,
        ends=[HELD_OUT],
        drop_outside=True,
    )
    profile = Profile(job.linears) if profiling is None else profiling.profile
    return Solved(profile, torch.cat(list(streams[HELD_OUT].hidden)), rehearsal.record.warnings)


@final
class _SolveLevels(Visitor):
    """Solves every linear of a block at every level that changes something, a tensor at a time onto the disk.

    Each stage is solved after those before it, which are left as `space.uniform` says.
    """

    def __init__(self, session: Session, space: Space, store: LevelStore) -> None:
        self.session, self.wanted, self.store = session, _Wanted.of(space), store
        self.left = {x.name: space.sparsity(i, space.uniform[i]) for i, x in enumerate(space.linears)}

    def begin(self, kept: Mapping[str, Any]) -> None:
        self.session.record.warnings += kept.get("warnings", [])

    def keep(self, blocks: int) -> Mapping[str, Any]:
        self.store.settle(blocks)
        return {"warnings": self.session.record.warnings}

    def visit(self, block: Block) -> None:
        pruned, wanted, store = PrunedBlock(self.session, block, self.left), self.wanted, self.store
        specs = {
            key_of(linear, number): (store.dtype, linear.shape)
            for linear in pruned.linears
            for number in wanted.levels[linear.name]
        }
        done, path = 0, store.path(block.index)
        with writing(path), TensorWriter(path, specs) as writer:
            for stage, statistics in pruned.stages():
                solve = _weights if stage.coupling is None else _members
                block.run.progress.detail("solving", done, len(specs))
                for linear, number, weight_OI in solve(pruned, stage, statistics, wanted):
                    writer.write(key_of(linear, number), weight_OI.to(store.dtype).cpu())
                    if number == wanted.left[linear.name]:
                        block.stack.set_weight(linear, weight_OI)
                    del weight_OI  # before the next one is made
                    done += 1
                    block.run.progress.detail("solving", done, len(specs))


def _weights(
    block: PrunedBlock, stage: Stage, statistics: Mapping[str, Statistics], wanted: _Wanted
) -> Iterator[_Solution]:
    """Each linear without some of its weights."""
    for linear in stage.linears:
        W_OI = block.job.stack.weight(linear)
        known = block.known(linear, statistics.get(linear.name), " while allocations were tried")
        for number, level in wanted.levels[linear.name].items():
            yield linear, number, block.solution(linear, W_OI, known, level.sparsity)[0].weight


def _members(
    block: PrunedBlock, stage: Stage, statistics: Mapping[str, Statistics], wanted: _Wanted
) -> Iterator[_Solution]:
    """A coupling without some of its members.

    All levels are solved from the dense block, so the one that the block is left at comes last.
    """
    coupling = stage.coupling
    assert coupling is not None
    name = coupling.consumer.name
    seen, levels, left = seen_by(block, coupling, statistics), wanted.levels[name], wanted.left[name]
    for number in sorted(levels, key=lambda number: number == left):
        smaller = without_members(block, coupling, seen, round(levels[number].sparsity * coupling.members))
        for linear in coupling.linears:
            yield linear, number, smaller.weights[linear.name][1]
        if number == left:
            smaller.set_biases(block, coupling)


def level_dtype(stack: Stack) -> torch.dtype:
    """Forwards round weights to the compute dtype anyway; nothing finer than the checkpoint is kept either."""
    checkpoint = stack.checkpoint
    stored = stack.compute if checkpoint is None else checkpoint.storage_dtype
    return min(stored, stack.compute, key=lambda dtype: dtype.itemsize)
