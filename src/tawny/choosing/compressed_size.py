"""What a compressed-tensors checkpoint weighs, before it is made: tensors to the byte, their names never too small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import final

from torch import Tensor

from tawny.allocation.profile import LinearInfo
from tawny.choosing.level import UNMEASURED, Level, Measures
from tawny.choosing.sizes import Sizes
from tawny.kinds import GPU_KINDS, KINDS, dividing, solved_kind
from tawny.model.tensorfile import NAMES
from tawny.pruning.prepare import Job, check_groups
from tawny.solvers.block_grid import grid_of
from tawny.solvers.grid import Grid

_REST = 2048  # metadata of shards, and the padding of their headers
_SHARD = "model-00001-of-00001.safetensors"


@final
class CompressedSize(Sizes):
    """Bytes of the weight files by what linears become. Head and embedding stay as they are: runtimes read them as floats.

    Args:
        kinds: of linears, the most bits first; one of floats leaves a linear as it is.
        together: linears that need one kind, because runtimes multiply them as one.

    Raises:
        ModelError: a linear that no such checkpoint holds.
        RecipeError: a width that no group divides.
    """

    sparsities = (0.0,)
    ends = ()
    head = embedding = tied = None
    head_numel = embedding_numel = 0

    def __init__(self, job: Job, kinds: Sequence[str] = (), together: Sequence[tuple[str, ...]] = ()) -> None:
        checkpoint = job.stack.checkpoint
        assert checkpoint is not None
        linears = [linear for group in job.by_block for linear in group]
        check_groups(linears, linears, "w4", None)
        self._widths = {linear.shape[1] for linear in linears}
        self._every = kinds_of(job)
        self.kinds, self.together = tuple(kinds) or self._every, together
        units = {target: unit for unit in checkpoint.units for target in unit.targets}
        self._keys = {linear.name: units[linear.key].sources[0] for linear in linears}
        self._dense = {name: checkpoint.bytes_of(key) for name, key in self._keys.items()}
        self._storage = checkpoint.storage_dtype
        self._long = 10 ** len(str(sum(map(checkpoint.bytes_of, checkpoint.files)))) - 1
        inside = set(self._keys.values())
        rest = [key for key in checkpoint.files if key not in inside]
        self.rest = float(_REST + sum(checkpoint.bytes_of(key) + self._named(key, 3) for key in rest))

    @property
    def every(self) -> tuple[str, ...]:
        return self._every

    def groups(self, kind: str) -> Sequence[int | None]:
        sizes = [
            size for size in solved_kind(kind).groups if size != -1
        ]  # the error of a row follows its width
        return [
            size for size in sizes if size is None or all(dividing(width, size) for width in self._widths)
        ]

    def grid(self, kind: str, width: int) -> Grid:
        return grid_of(kind, None, width)

    def rounded_end(self, W_OI: Tensor, kind: str, name: str) -> Tensor:
        raise AssertionError("ends stay as they are")

    def linear(
        self, info: LinearInfo, level: Level, group: int | None = None, measures: Measures = UNMEASURED
    ) -> int:
        key = self._keys[info.name]
        if level.kind not in GPU_KINDS:
            return self._dense[info.name] + self._named(key, 2)
        out, width = info.shape
        scales = out * (width // dividing(width, group)) * self._storage.itemsize
        names = sum(self._named(f"{key}_{part}", 2) for part in ("packed", "scale", "shape"))
        return out * width * GPU_KINDS[level.kind].bits // 8 + scales + 2 * 8 + names

    def of_head(self, kind: str | None) -> int:
        return 0

    def of_embedding(self, kind: str | None) -> int:
        return 0

    def _named(self, key: str, dimensions: int) -> int:
        """Bytes in which a header names a tensor, and an index its shard."""
        facts = {"dtype": "BF16", "shape": [10**6] * dimensions, "data_offsets": [self._long] * 2}
        return len(json.dumps({key: facts})) + len(json.dumps({key: _SHARD}))


def kinds_of(job: Job) -> tuple[str, ...]:
    """Those of a fit: as the checkpoint has the weight, and those for GPUs."""
    checkpoint = job.stack.checkpoint
    assert checkpoint is not None
    storage = NAMES[checkpoint.storage_dtype]
    floats = next(name for name, kind in KINDS.items() if kind.exact[:1] == (storage,))
    return (floats, *GPU_KINDS)
