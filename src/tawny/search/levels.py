"""Solutions of every linear at every level, kept on disk.

One walk through the model solves each linear at each level with the recipe's solver or what stands in for it, and
remembers what an allocator wants to know of the dense model and the dense model's last hidden states. A linear is
solved for what it would receive in a model that is pruned uniformly so far: solutions for dense inputs do not make up for
what is lost before them, and a model put together from such says little of one that is pruned.
"""

from __future__ import annotations

__all__ = ["LevelStore", "Solved", "outside_digest", "solve_levels"]

import hashlib
import json
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor, nn

from tawny.allocation.profile import LinearInfo, Profile
from tawny.calibration.observe import observe
from tawny.calibration.statistics import Statistics
from tawny.errors import OutputError, TawnyError
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.model.tensorfile import Entry, TensorWriter, entries, free_bytes, raw, read_tensor
from tawny.pruning.block import BlockRun
from tawny.pruning.journal import LEVELS
from tawny.pruning.profiling import LazyWeights, profile_samples
from tawny.pruning.run import Run
from tawny.search.cost import store_bytes
from tawny.search.rehearsal import Rehearsal, dense_again
from tawny.search.space import Space


class LevelStore:
    """One file a block in `folder`.

    Args:
        kept: of how many blocks the solutions are there already; whatever else is in the folder goes, unless there are any.

    Raises:
        OutputError: the disk has not enough room, or what is said to be there is not.
    """

    def __init__(self, folder: Path, space: Space, dtype: torch.dtype, *, kept: int = 0) -> None:
        self.folder, self.dtype = folder, dtype
        self.bytes = store_bytes(space, dtype)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        there = 0
        for path in map(self.path, range(kept)):
            if not path.is_file():
                raise OutputError(
                    f"{path}, which an unfinished search goes on from, is missing; put it back, or pass --overwrite to "
                    "start over"
                )
            there += sum(entry.bytes for entry in entries(path).values())
        free = free_bytes(folder)
        if free < self.bytes - there:
            if not kept:
                self.remove()
            raise OutputError(
                f"the solutions a search compares take {(self.bytes - there) / 1e9:.1f} GB, and {folder.parent} has "
                f"{free / 1e9:.1f} GB free: choose fewer allocator.levels, or another place"
            )
        self._file: IO[bytes] | None = None
        self._entries: dict[str, Entry] = {}

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def open(self, index: int) -> None:
        """Turn to the file of one block."""
        self._turn()
        if self.path(index).is_file():
            self._entries = entries(self.path(index))
            self._file = self.path(index).open("rb")

    def read(self, linear: Linear, level: int) -> Tensor | None:
        """`[out, in]`, or None where the level removes nothing."""
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
        profile: measures of every block, for the allocators.
        hidden: `[windows, tokens, hidden]` of the dense model behind its last block.
        weights: SHA-256 of the weights of all blocks.
        warnings: linears that saw no token.
    """

    profile: Profile
    hidden: Tensor
    weights: str
    warnings: list[str]


def solve_levels(
    run: Run,
    space: Space,
    store: LevelStore,
    *,
    solver: Any,
    measuring: Any,
    samples: Samples,
    held_out: Samples,
) -> Solved:
    """Walk through the model once, behind blocks that are pruned uniformly.

    Args:
        run: its stack is dense before and after.
        space: the levels to solve each linear at; its linears are those of the run, in order.
        solver: of the recipe, or a cheaper one.
        measuring: something with `needs` and `measure`, as an allocator; it sees the dense model, and as many samples
            as an allocator alone.
        samples: calibration tokens for statistics.
        held_out: windows to compare models on.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    stack = run.stack
    walk = _Walk(run, samples, held_out, store, solver=solver, measuring=measuring)
    uniform = {x.name: space.sparsity(i, 0) for i, x in enumerate(space.linears)}
    run.progress.phase("solving at each level", len(stack) - walk.dense.depth)
    for block in walk.blocks(uniform):
        with dense_again(block):
            walk.dense.advance(block.index)
            walk.measure(block)
            _solve_block(block, space, store)
            block.advance()
    infos = tuple(LinearInfo(x.name, x.shape, x.block, walk.stages.get(x.name, "")) for x in space.linears)
    hidden = torch.cat(list(walk.dense.hidden))
    weights = hashlib.sha256("".join(walk.digests).encode()).hexdigest()
    return Solved(Profile(infos, tuple(walk.measures)), hidden, weights, walk.record.warnings)


class _Walk(Rehearsal):
    """Block by block in the journal of the run that searches.

    Attributes:
        dense: the held-out windows on their way through the dense model.
        measured: what allocators are shown of it, if any wants to see it.
        measures: of every block so far, in JSON types.
        stages: of every linear that was observed.
        digests: SHA-256 of every block's weights.
    """

    walk: ClassVar[str] = LEVELS

    def __init__(
        self, of: Run, samples: Samples, held_out: Samples, store: LevelStore, *, solver: Any, measuring: Any
    ) -> None:
        super().__init__(of, samples, of.progress, solver)
        self.journal, self.store, self.measuring = of.journal, store, measuring
        done, found = self.journal.walk(self.walk)
        self.measures: list[dict[str, Any]] = found.get("measures", [])
        self.stages: dict[str, str] = found.get("stages", {})
        self.digests: list[str] = found.get("digests", [])
        self._durable = done
        self.dense = self._resumed("held_out", held_out, done)
        self.measured = None
        if measuring.needs != "none" and done < len(of.stack):
            self.measured = self._resumed("measured", profile_samples(samples, of.recipe), done)

    def _resumed(self, name: str, samples: Samples, done: int) -> Stream:
        return Stream(self.stack, samples, depth=done, saved=self.journal.hidden(self.walk, name))

    def measure(self, block: BlockRun) -> None:
        """What the allocators read from a dense block, and the hash of it."""
        stack = self.stack
        statistics: Mapping[str, Statistics] = {}
        if self.measured is not None:
            last = block.index == len(stack) - 1
            needs = self.measuring.needs
            seen = observe(self.measured, block.index, block.linears, needs, advance=not last)
            self.stages.update({x.name: str(n) for n, stage in enumerate(seen.stages) for x in stage.linears})
            statistics = seen.statistics
        # Linears as they are stored, and so solved; all else as it is computed with.
        own = {id(getattr(linear.module, linear.parameter)) for linear in block.linears}
        digest = _digest(stack.blocks[block.index], own)
        inputs = LazyWeights(stack, block.linears, statistics)
        for weight in inputs.finite():
            digest.update(raw(weight))
            del weight  # before the next one is made
        self.digests.append(digest.hexdigest())
        try:
            self.measures.append(json.loads(json.dumps(self.measuring.measure(inputs))))
        except TawnyError as error:
            raise type(error)(f"block {stack.name(block.index)}: {error}") from error

    def commit(self, blocks: int, streams: Mapping[str, Stream | None]) -> None:
        if self.journal.folder is None:
            return
        for path in map(self.store.path, range(self._durable, blocks)):
            with writing(path):
                durable.sync(path)
        self._durable = blocks
        found = {
            "measures": self.measures,
            "stages": self.stages,
            "digests": self.digests,
            "warnings": self.record.warnings,
        }
        kept = {**streams, "held_out": self.dense}
        if blocks < len(self.stack):
            kept["measured"] = self.measured
        self.of.note_cost()
        self.journal.commit(self.walk, blocks, found, kept)


def _digest(module: nn.Module, without: Container[int]) -> hashlib._Hash:
    """SHA-256 of a module's tensors as they are used, `without` some, given by `id`."""
    digest = hashlib.sha256()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if id(value) not in without:
            digest.update(name.encode() + raw(value))
    return digest


def outside_digest(stack: Stack) -> str:
    """SHA-256 of what is in no block, on which every score depends as well."""
    stack.load_head()
    inside = {id(value) for part in (stack.blocks.parameters(), stack.blocks.buffers()) for value in part}
    return _digest(stack.model, inside).hexdigest()


def _solve_block(block: BlockRun, space: Space, store: LevelStore) -> None:
    """Every linear of one block at every level that removes something, a tensor at a time onto the disk.

    The block is left pruned uniformly, each stage behind those before it.
    """
    run = block.run
    levels: dict[str, dict[int, float]] = {}
    for i, x in enumerate(space.linears):
        if x.block == block.index:
            levels[x.name] = {level: s for level in space.levels if (s := space.sparsity(i, level)) > 0}
    specs = {
        key_of(linear, level): (store.dtype, linear.shape)
        for linear in block.linears
        for level in levels[linear.name]
    }
    done, path = 0, store.path(block.index)
    with writing(path), TensorWriter(path, specs) as writer:
        for stage, statistics in block.stages(run.recipe.order):
            for linear in stage.linears:
                W_OI, seen = run.stack.weight(linear), statistics.get(linear.name)
                known = block.known(linear, seen)
                if known is not seen:
                    run.record.warnings.append(
                        f"{linear.name} saw no calibration token while allocations were tried"
                    )
                for level, sparsity in levels[linear.name].items():
                    run.progress.detail("solving", done, len(specs))
                    solution, _, _ = block.solution(linear, W_OI, known, sparsity)
                    writer.write(key_of(linear, level), solution.weight.to(store.dtype).cpu())
                    if level == 0:
                        run.stack.set_weight(linear, solution.weight)
                    done += 1
