"""What a run does at every block: solve it stage by stage, train what is left, write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, final

from torch import Tensor

from tawny.calibration.observe import Stage
from tawny.calibration.statistics import Statistics
from tawny.errors import RecipeError
from tawny.gguf_kinds import GGUF_KINDS
from tawny.model.streams import Samples
from tawny.precision import DTYPES, cast
from tawny.pruning.block import DENSE, PRUNED, PrunedBlock
from tawny.pruning.blocks import remove_block
from tawny.pruning.members import solve_members
from tawny.pruning.refine import refine
from tawny.pruning.session import Session
from tawny.record import LinearRecord
from tawny.run.walk import Block, Visitor
from tawny.run.writer import ENCODED_PART


def samples_of(session: Session) -> dict[str, Samples]:
    """What goes through the blocks while they are pruned: nothing where only weights are looked at."""
    refining = session.job.recipe.refine.epochs > 0
    if session.samples is None or (session.job.needs == "none" and not refining):
        return {}
    return dict.fromkeys([PRUNED, DENSE] if refining else [PRUNED], session.samples)


@final
class Solve(Visitor):
    """Prunes the linears of each block to their sparsities, and records what became of them.

    Attributes:
        pruned: the block that is visited.
    """

    pruned: PrunedBlock

    def __init__(self, session: Session, allocation: Mapping[str, float]) -> None:
        self.session, self.allocation = session, allocation
        if session.run.ranks.size > 1 and any(kind in GGUF_KINDS for kind in session.record.values.values()):
            raise RecipeError(
                "types of GGUF files are solved in one process, and torchrun started several: run it with one"
            )

    def begin(self, kept: Mapping[str, Any]) -> None:
        record = self.session.record
        record.linears = [LinearRecord.from_dict(entry) for entry in kept.get("linears", [])]
        record.warnings += kept.get("warnings", [])

    def keep(self, blocks: int) -> Mapping[str, Any]:
        record = self.session.record
        return {"linears": [asdict(entry) for entry in record.linears], "warnings": record.warnings}

    @contextmanager
    def around(self, block: Block) -> Iterator[None]:
        self.pruned = PrunedBlock(self.session, block, self.allocation, keep=DENSE in block.streams)
        yield
        self.pruned.note_outliers()

    def visit(self, block: Block) -> None:
        for stage, statistics in self.pruned.stages():
            _solve_stage(self.pruned, stage, statistics)
        if self.pruned.encoded and self.session.output is not None:
            self.session.output.write_block(f"{block.index:05d}{ENCODED_PART}", self.pruned.encoded)


def _solve_stage(block: PrunedBlock, stage: Stage, statistics: Mapping[str, Statistics]) -> None:
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
    block: PrunedBlock, stage: Stage, owners: list[int], statistics: Mapping[str, Statistics]
) -> None:
    """Send every solved weight of a stage to all ranks, as it is stored, and put the records together."""
    session, stack = block.session, block.job.stack
    ranks, record, names = session.run.ranks, session.record, {linear.name for linear in stage.linears}
    with session.run.clock("exchange"):
        for linear, owner in zip(stage.linears, owners, strict=True):
            stack.set_weight(linear, ranks.send(stack.stored_weight(linear), owner))
        own = [asdict(entry) for entry in record.linears if entry.name in names]
        told = ranks.all_of((own, record.warnings[block.warned :]))
    known = {entry["name"]: LinearRecord.from_dict(entry) for entries, _ in told for entry in entries}
    record.linears = [entry for entry in record.linears if entry.name not in names]
    record.linears += [known[linear.name] for linear in stage.linears]
    record.warnings[block.warned :] = sorted(line for _, lines in told for line in lines)
    block.warned = len(record.warnings)


@final
class Refine(Visitor):
    """Trains what a solved block has left, where dense samples go along, and corrects what is recorded of it."""

    def __init__(self, solve: Solve) -> None:
        self.solve, self.session = solve, solve.session

    def begin(self, kept: Mapping[str, Any]) -> None:
        self.session.record.refined = kept.get("refined", [])

    def keep(self, blocks: int) -> Mapping[str, Any]:
        return {"refined": self.session.record.refined}

    def around(self, block: Block) -> AbstractContextManager[None]:
        """Let the dense samples pass, before anything is pruned: their outputs are what refining aims at."""
        if DENSE in block.streams:
            with block.run.clock("forward"):
                detail = block.run.progress.detail
                block.streams[DENSE].advance(block.index, lambda: detail("dense outputs", 0, 0))
        return nullcontext()

    def visit(self, block: Block) -> None:
        pruned, session, recipe = self.solve.pruned, self.session, self.session.job.recipe
        if pruned.solved is None or not pruned.linears or pruned.leaves:
            return
        with block.run.clock("refine"):
            refined = refine(
                block.stack,
                block.index,
                block.streams[PRUNED],
                block.streams[DENSE],
                pruned.linears,
                pruned.solved,
                recipe.refine,
                recipe.seed,
                step=lambda done, total: block.run.progress.detail("refining", done, total),
                dtype=DTYPES[recipe.dtype] if recipe.dtype else None,
                kinds=pruned.few_bits(),
            )
        pruned.solved.clear()
        session.record.refined.append(asdict(refined))
        if "finite" in refined.stopped:
            session.record.warnings.append(
                f"refining {block.name}: {refined.stopped}; epoch {refined.best_epoch} was kept"
            )
        entries = {entry.name: entry for entry in session.record.linears}
        for linear in pruned.linears:
            if pruned.grid(linear) is not None:
                continue  # a grid keeps what was removed, and has a level at 0
            entry = entries[linear.name]
            entry.zeros = int((block.stack.weight(linear) == 0).sum())
            entry.sparsity = entry.zeros / linear.numel


@final
class Write(Visitor):
    """Hands the tensors of each block, under the names they came with, to the output."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def visit(self, block: Block) -> None:
        output, checkpoint = self.session.output, block.stack.checkpoint
        if output is None or checkpoint is None:
            return
        with block.run.clock("write"):
            tensors: dict[str, Tensor] = {}
            for unit in checkpoint.units_of(block.name):
                parameters = {name: block.stack.stored[name] for name in unit.targets}
                tensors |= checkpoint.store(
                    unit, parameters, block.stack.model, fewer=bool(self.session.job.mixtures)
                )
            output.write_block(
                f"{block.index:05d}", {name: self._stored(name, value) for name, value in tensors.items()}
            )

    def _stored(self, name: str, value: Tensor) -> Tensor:
        wanted = self.session.job.recipe.dtype
        return cast(value, DTYPES[wanted], name) if wanted and value.is_floating_point() else value

    def keep(self, blocks: int) -> Mapping[str, Any]:
        if self.session.output is not None:
            self.session.output.settle()
        return {}
