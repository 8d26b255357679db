"""Solutions of every linear at every level, kept on disk.

One walk through the model solves each linear at each level with the recipe's solver or what stands in for it. It also keeps
what candidates want to know of the dense model, and the dense model's last hidden states. A linear is solved for what
it would receive in a model that is pruned uniformly so far. Solutions for dense inputs do not make up for what is lost
before them, and a model that is put together from such solutions says little of a pruned one.
"""

from __future__ import annotations

__all__ = ["LevelStore", "Solved", "level_dtype", "solve_levels"]

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tawny.allocation.joint import Survey
from tawny.allocation.profile import Profile
from tawny.calibration.observe import Stage, observe
from tawny.calibration.statistics import Statistics
from tawny.choosing.level import Level
from tawny.choosing.member_space import AnySpace
from tawny.choosing.rehearsal import dense_again, rehearsing
from tawny.errors import OutputError
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.model.tensorfile import Entry, TensorWriter, entries, free_bytes, read_tensor
from tawny.pruning.block import LoadedBlock
from tawny.pruning.members import seen_by, without_members
from tawny.pruning.prepare import profile_count
from tawny.pruning.profiling import LazyWeights, measured, places, with_stages
from tawny.pruning.session import Session
from tawny.pruning.walk import walk_blocks
from tawny.solvers.base import Solver
from tawny.solvers.members import MemberSolver

WALK = "levels"  # what the journal calls it
_Levels = Mapping[str, Mapping[int, Level]]  # by linear and number
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
        self._entries: dict[str, Entry] = {}

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

    def _turn(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._entries = None, {}

    def close(self) -> None:
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
        hidden: `[windows, tokens, hidden]` of the dense model behind its last block.
        warnings: linears that saw no token.
    """

    profile: Profile
    hidden: Tensor
    warnings: list[str]


def solve_levels(
    session: Session,
    space: AnySpace,
    store: LevelStore,
    *,
    solver: Solver | MemberSolver,
    survey: Survey,
    samples: Samples,
    held_out: Samples,
) -> Solved:
    """Walk through the model once, behind blocks that are pruned uniformly.

    Args:
        session: its stack is dense before and after; finished blocks are in its journal.
        space: the levels to solve each linear at; its linears are those of the session, in order.
        solver: of the recipe, or a quicker one.
        survey: what candidates want to know of the dense model, on as many samples as an allocator alone would see.
        samples: calibration tokens for statistics.
        held_out: windows to compare models on.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    job, journal = session.job, session.run.journal
    stack = job.stack
    done, found = journal.walk(WALK)
    measures: list[dict[str, Any]] = found.get("measures", [])
    stages: dict[str, str] = found.get("stages", {})
    rehearsal = rehearsing(session, samples, journal, solver)
    rehearsal.record.warnings += found.get("warnings", [])
    dense = Stream(stack, held_out, depth=done, saved=journal.hidden(WALK, "held_out"))
    seen: Stream | None = None
    if survey.needs != "none" and done < len(stack):
        some = samples.first(profile_count(job.recipe, len(samples), samples.seqlen))
        seen = Stream(stack, some, depth=done, saved=journal.hidden(WALK, "measured"))

    def commit(blocks: int, streams: Mapping[str, Stream | None]) -> None:
        if journal.folder is None:
            return
        store.settle(blocks)
        kept = {**streams, "held_out": dense, "measured": seen if blocks < len(stack) else None}
        session.note_cost()
        told = {"measures": measures, "stages": stages, "warnings": rehearsal.record.warnings}
        journal.commit(WALK, blocks, told, kept)

    uniform = {x.name: space.sparsity(i, 0) for i, x in enumerate(space.linears)}
    session.run.progress.phase("solving at each level", len(stack) - done)
    for block in walk_blocks(rehearsal, uniform, WALK, commit):
        with dense_again(block):
            dense.advance(block.index)
            statistics: Mapping[str, Statistics] = {}
            if seen is not None:
                last = block.index == len(stack) - 1
                observed = observe(seen, block.index, block.linears, survey.needs, advance=not last)
                stages |= places(observed.stages)
                statistics = observed.statistics
            inputs = LazyWeights(stack, block.linears, statistics)
            inputs.check_finite()
            measures.append(measured(survey, inputs, stack.name(block.index)))
            del inputs, statistics
            _solve_block(block, space, store)
            block.advance()
    profile = Profile(with_stages(job.linears, stages), tuple(measures))
    return Solved(profile, torch.cat(list(dense.hidden)), rehearsal.record.warnings)


def _solve_block(block: LoadedBlock, space: AnySpace, store: LevelStore) -> None:
    """Every linear of one block at every level that changes something, a tensor at a time onto the disk.

    The block is left pruned uniformly, each stage behind those before it.
    """
    stack, session = block.job.stack, block.session
    levels = {
        x.name: {k: space.level(i, k) for k in space.levels_of(i) if space.changes(i, k)}
        for i, x in enumerate(space.linears)
        if x.block == block.index
    }
    specs = {
        key_of(linear, level): (store.dtype, linear.shape)
        for linear in block.linears
        for level in levels[linear.name]
    }
    done, path = 0, store.path(block.index)
    with writing(path), TensorWriter(path, specs) as writer:
        for stage, statistics in block.stages():
            solve = _weights if stage.coupling is None else _members
            session.run.progress.detail("solving", done, len(specs))
            for linear, level, weight_OI in solve(block, stage, statistics, levels):
                writer.write(key_of(linear, level), weight_OI.to(store.dtype).cpu())
                if level == 0:
                    stack.set_weight(linear, weight_OI)
                del weight_OI  # before the next one is made
                done += 1
                session.run.progress.detail("solving", done, len(specs))


def _weights(
    block: LoadedBlock, stage: Stage, statistics: Mapping[str, Statistics], levels: _Levels
) -> Iterator[_Solution]:
    """Each linear without some of its weights."""
    for linear in stage.linears:
        W_OI, seen = block.job.stack.weight(linear), statistics.get(linear.name)
        known = block.known(linear, seen)
        if known is not seen:
            block.session.record.warnings.append(
                f"{linear.name} saw no calibration token while allocations were tried"
            )
        for number, level in levels[linear.name].items():
            yield linear, number, block.solution(linear, W_OI, known, level.sparsity)[0].weight


def _members(
    block: LoadedBlock, stage: Stage, statistics: Mapping[str, Statistics], levels: _Levels
) -> Iterator[_Solution]:
    """A coupling without some of its members.

    All levels are solved from the dense block, so level 0, which the block is left at, comes last.
    """
    coupling = stage.coupling
    assert coupling is not None
    seen, own = seen_by(block, coupling, statistics), levels[coupling.consumer.name]
    for level in sorted(own, key=lambda level: level == 0):
        made = without_members(block, coupling, seen, round(own[level].sparsity * coupling.members))
        for linear in coupling.linears:
            yield linear, level, made.weights[linear.name][1]
        if level == 0:
            made.set_biases(block, coupling)


def level_dtype(stack: Stack) -> torch.dtype:
    """Forwards round weights to the compute dtype anyway; nothing finer than the checkpoint is kept either."""
    checkpoint = stack.checkpoint
    stored = stack.compute if checkpoint is None else checkpoint.storage_dtype
    return min(stored, stack.compute, key=lambda dtype: dtype.itemsize)
