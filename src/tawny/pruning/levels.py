"""Solutions of every linear at every level, kept on disk.

One walk through the model solves each linear at each level with the recipe's solver or what stands in for it, and
remembers what an allocator wants to know of the dense model and the dense model's last hidden states. A linear is
solved for what it would receive in a model that is pruned uniformly so far: solutions for dense inputs do not make up for
what is lost before them, and a model put together from such says little of one that is pruned.
"""

from __future__ import annotations

__all__ = ["LevelStore", "Solved", "solve_levels"]

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from tawny.allocation.profile import LinearInfo, Profile
from tawny.calibration.observe import observe
from tawny.calibration.statistics import Statistics
from tawny.errors import OutputError, TawnyError
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.streams import Samples, Stream
from tawny.model.tensorfile import Entry, TensorWriter, entries, free_bytes, raw, read_tensor
from tawny.pruning.block import BlockRun
from tawny.pruning.profiling import LazyWeights, profile_samples
from tawny.pruning.rehearsal import Rehearsal, dense_again
from tawny.pruning.run import Run
from tawny.pruning.search_cost import store_bytes
from tawny.pruning.space import Space


class LevelStore:
    """One file a block in `folder`, which is removed by `close`.

    Raises:
        OutputError: the disk has not enough room.
    """

    def __init__(self, folder: Path, space: Space, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.bytes = store_bytes(space, dtype)
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir(parents=True)
        free = free_bytes(folder)
        if free < self.bytes:
            self.close()
            raise OutputError(
                f"the solutions a search compares take {self.bytes / 1e9:.1f} GB, and {folder.parent} has "
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
        if hasattr(self, "_file"):
            self._turn()
        shutil.rmtree(self.folder, ignore_errors=True)


def key_of(linear: Linear, level: int) -> str:
    return f"{linear.name}@{level}"


@dataclass
class Solved:
    """What the walk leaves behind beside the store.

    Attributes:
        profile: measures of every block, for the allocators.
        hidden: `[windows, tokens, hidden]` of the dense model behind its last block.
        weights: SHA-256 of all weights that were solved.
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
    walk = Rehearsal(run, samples, run.watch, solver)
    dense = Stream(stack, held_out)
    measured = None
    if measuring.needs != "none":
        measured = Stream(stack, profile_samples(samples, run.recipe))
    stages: dict[str, str] = {}
    measures: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    uniform = {x.name: space.sparsity(i, 0) for i, x in enumerate(space.linears)}
    run.watch.phase("solving at each level", len(stack))
    for block in walk.blocks(uniform):
        with dense_again(block):
            dense.advance(block.index)
            measures.append(_measure(block, measured, measuring, digest, stages))
            _solve_block(block, space, store)
            block.advance()
    infos = tuple(LinearInfo(x.name, x.shape, x.block, stages.get(x.name, "")) for x in space.linears)
    hidden = torch.cat(list(dense.hidden))
    return Solved(Profile(infos, tuple(measures)), hidden, digest.hexdigest(), walk.record.warnings)


def _measure(
    block: BlockRun, stream: Stream | None, measuring: Any, digest: Any, stages: dict[str, str]
) -> dict[str, Any]:
    """What `measuring` says of a dense block, in JSON types; its weights go into the digest, its stages into `stages`."""
    stack = block.run.stack
    statistics: Mapping[str, Statistics] = {}
    if stream is not None:
        last = block.index == len(stack) - 1
        seen = observe(stream, block.index, block.linears, measuring.needs, advance=not last)
        stages.update({x.name: str(n) for n, stage in enumerate(seen.stages) for x in stage.linears})
        statistics = seen.statistics
    inputs = LazyWeights(stack, block.linears, statistics)
    for weight in inputs.finite():
        digest.update(raw(weight))
        del weight  # before the next one is made
    try:
        made: dict[str, Any] = json.loads(json.dumps(measuring.measure(inputs)))
    except TawnyError as error:
        raise type(error)(f"block {stack.name(block.index)}: {error}") from error
    return made


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
                    run.watch.detail("solving", done, len(specs))
                    solution, _, _ = block.solution(linear, W_OI, known, sparsity)
                    writer.write(key_of(linear, level), solution.weight.to(store.dtype).cpu())
                    if level == 0:
                        run.stack.set_weight(linear, solution.weight)
                    done += 1
