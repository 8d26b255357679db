"""What a model's files will weigh, before they are made: tensors to the byte, the index beside them never too small.

`pack` writes tensors, a header for each shard, and an index that names each tensor with its hash. Only what is in the
index in decimal numbers is not known before, so there the longest number is taken. It is a few bytes for each tensor.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from tawny.allocation.profile import LinearInfo
from tawny.choosing.level import KINDS_TRIED, SPARSITIES, UNMEASURED, Level, Measures
from tawny.choosing.sizes import Sizes
from tawny.errors import ModelError
from tawny.kinds import KINDS, kind_of
from tawny.model.checkpoint import Checkpoint
from tawny.model.linears import is_plain
from tawny.model.shards import SHARD_BYTES
from tawny.model.tensorfile import NAMES
from tawny.packed import format
from tawny.packed.choice import pack_end
from tawny.packed.folder import PackedLinearEntry
from tawny.packed.install import ends_of, table_of
from tawny.patterns import removed_count
from tawny.pruning.prepare import Job
from tawny.solvers.grid import ACCIDENTS, Grid

_SHARD = "packed-00001-of-00001.safetensors"
_NEARLY = 0.85  # a solve moves the share of zeros that rounding makes
_REST = 2048  # metadata, shards, and the padding of headers


@final
class PackedSize(Sizes):
    """Bytes of the files that packing a model makes, by what its linears and its head become.

    Args:
        job: its stack is that of a checkpoint.

    Raises:
        ModelError: a linear cannot be packed; names it.

    Attributes:
        head: module path of a head that can be packed; None where there is none.
        head_numel: its weights.
        embedding: module path of an embedding that can be packed and shares no weight with the head; None where there is none.
        embedding_numel: its weights.
        rest: bytes of all that is the same whatever linears and head become.
    """

    kinds = ends = KINDS_TRIED
    sparsities = SPARSITIES

    def __init__(self, job: Job) -> None:
        self._values = job.recipe.values
        checkpoint, model = job.stack.checkpoint, job.stack.model
        assert checkpoint is not None
        units = {target: unit for unit in checkpoint.units for target in unit.targets}
        self._sources: dict[str, tuple[str, ...]] = {}
        self._known: dict[PackedLinearEntry, int] = {}
        inside: set[str] = set()
        linears = [linear for group in job.by_block for linear in group]
        experts = Counter(linear.key for linear in linears)
        for linear in linears:
            unit = units[linear.key]
            plain = is_plain(linear.module) and unit.converter is None
            if linear.expert is None and not plain:
                raise ModelError(
                    f"{linear.name} cannot be packed, because its module does more than multiply or its file holds it "
                    "in another layout; `tawny fit` is for models of which every linear can"
                )
            # Experts are stored apart, each in as many tensors, or together in one.
            count = 1 if linear.expert is None else max(1, len(unit.sources) // experts[linear.key])
            self._sources[linear.name] = tuple(unit.sources[:count])
            inside.update(unit.sources)
        outside, embedding, tied = ends_of(model)
        keys = [] if outside is None else [f"{outside}.weight", *([f"{embedding}.weight"] if tied else [])]
        ends = [units[key] for key in keys if key in units]
        module = None if outside is None else model.get_submodule(outside)
        packs = ends and all(unit.converter is None for unit in ends)
        self.head = outside if packs and isinstance(module, nn.Linear) and is_plain(module) else None
        self.tied = embedding if tied else None
        self._ends = [unit.sources[0] for unit in ends] if self.head else []
        table = None if tied or embedding is None or not self.head else units.get(f"{embedding}.weight")
        apart = table is not None and table.converter is None
        self.embedding = (
            embedding if apart and isinstance(model.get_submodule(embedding or ""), nn.Embedding) else None
        )
        self._table = list(table.sources) if table is not None and self.embedding else []
        self._storage = NAMES[checkpoint.storage_dtype]
        total = sum(map(checkpoint.bytes_of, checkpoint.files))
        self._long = 10 ** len(str(total)) - 1  # no offset has more digits
        inside.update([*self._ends, *self._table])
        kept = [key for key in checkpoint.files if key not in inside]
        self.rest = _REST + sum(self._dense(checkpoint, key) for key in kept)
        self.rest += sum(self._header(checkpoint, key, index=total > SHARD_BYTES) for key in checkpoint.files)
        self._dense_head, self._dense_table = (
            sum(self._dense(checkpoint, key) for key in keys) for keys in (self._ends, self._table)
        )
        self._head_shape = _shape(checkpoint, self._ends)
        self._table_shape = _shape(checkpoint, self._table)
        self.head_numel = math.prod(self._head_shape)
        self.embedding_numel = math.prod(self._table_shape)

    def grid(self, kind: str, width: int) -> Grid:
        return self._values.grid(kind)

    def rounded_end(self, W_OI: Tensor, kind: str, name: str) -> Tensor:
        return format.unpack(pack_end(W_OI, kind, name), W_OI.dtype).to(W_OI.device)

    def linear(
        self, info: LinearInfo, level: Level, group: int | None = None, measures: Measures = UNMEASURED
    ) -> int:
        """Bytes of one linear and of what names it; an integer that rounds to 0 may make it a little smaller.

        Args:
            group: columns of a scale; None is the kind's usual number.
            measures: zeros that the weight has already, which are kept where they are more than a few, how far scales lie apart,
                and how many weights the kind rounds to 0; all of them where that is not known.
        """
        kind, removed = level.kind, removed_count(info.numel, level.sparsity)
        if measures.had > ACCIDENTS * info.numel:
            removed = max(removed, measures.had)
        few = measures.rounds.get(kind, 1.0) if 0 in KINDS[kind].grid else measures.had / info.numel
        return self._packed(
            info.name,
            info.shape,
            info.numel - removed,
            kind,
            group,
            self._sources[info.name],
            far=measures.far,
            rounds=few,
        )

    def of_embedding(self, kind: str | None) -> int:
        """Bytes of an embedding that shares no weight with the head; None leaves it as it is."""
        if self.embedding is None or kind is None:
            return self._dense_table
        name, numel = table_of(self.embedding), self.embedding_numel
        return self._packed(name, self._table_shape, numel, kind, None, self._table, self.embedding)

    def of_head(self, kind: str | None) -> int:
        """Bytes of the head, with an embedding that is tied to it; None leaves it as it is."""
        if self.head is None or kind is None:
            return self._dense_head
        rows, columns = self._head_shape
        return self._packed(self.head, (rows, columns), rows * columns, kind, None, self._ends)

    def _packed(
        self,
        name: str,
        shape: tuple[int, int],
        kept: int,
        kind: str,
        group: int | None,
        sources: Sequence[str],
        embedding: str | None = None,
        far: bool = False,
        rounds: float | None = None,
    ) -> int:
        numel = shape[0] * shape[1]
        whole = format.cheaper_whole(kept / numel, kind_of(kind))
        entry = PackedLinearEntry(
            name,
            shape,
            kind,
            group,
            kept,
            tuple(sources),
            False,
            self._storage,
            embedding or self.tied,
            None,
            1000,
            whole,
            KINDS[kind].bits < 8 and not far,
        )
        if not whole or KINDS[kind].bits == 8:
            return self._weighs(entry)
        # So many weights may become 0 that they get a mask: by rounding, or in rows that are 0 where a grid has none.
        least = 1 / KINDS[kind].bits if 0 in KINDS[kind].grid else format.COINCIDENCE
        likely = float(0 in KINDS[kind].grid) if rounds is None else rounds
        if likely < _NEARLY * least:
            return self._weighs(entry)
        masked = replace(entry, nnz=numel - math.ceil(least * numel), whole=False)
        return max(self._weighs(entry), self._weighs(masked))

    def _weighs(self, entry: PackedLinearEntry) -> int:
        """Bytes of a packed weight and of what names it; thousands of experts are alike but for the letters of their names."""
        sources = tuple("x" * len(source) for source in entry.sources)
        alike = replace(entry, name="x" * len(entry.name), sources=sources)
        if (known := self._known.get(alike)) is not None:
            return known
        total = len(json.dumps({entry.name: entry.to_dict()}, separators=(",", ":")))
        for key, (dtype, size) in entry.wanted().items():
            stored = torch.Size(size).numel() * dtype.itemsize
            total += stored + self._told(f"{entry.name}.{key}", NAMES[dtype], size)
        self._known[alike] = total
        return total

    def _told(self, name: str, dtype: str, shape: Sequence[int]) -> int:
        """Bytes in which index and header name one tensor."""
        facts: dict[str, Any] = {"dtype": dtype, "shape": list(shape)}
        header = {name: {**facts, "data_offsets": [self._long, self._long]}}
        place = {"shard": _SHARD, "offset": self._long, "bytes": self._long, "sha256": "0" * 64}
        parts = (header, {name: {**facts, **place}}, {name: _SHARD})
        return sum(len(json.dumps(part, separators=(",", ":"))) for part in parts)

    def _dense(self, checkpoint: Checkpoint, key: str) -> int:
        """A tensor that stays as it is."""
        named = self._told(key, checkpoint.dtypes[key], checkpoint.shapes[key])
        return checkpoint.bytes_of(key) + named

    def _header(self, checkpoint: Checkpoint, key: str, *, index: bool) -> int:
        """What the packed index keeps of the dense checkpoint's headers, and of its index where it has one."""
        offsets = [self._long, self._long]
        facts = {
            "dtype": checkpoint.dtypes[key],
            "shape": list(checkpoint.shapes[key]),
            "data_offsets": offsets,
        }
        header = len(json.dumps(json.dumps({key: facts}, separators=(",", ":"))))
        return header + (len(json.dumps(json.dumps({key: _SHARD}))) if index else 0)


def _shape(checkpoint: Checkpoint, keys: Sequence[str]) -> tuple[int, int]:
    """Rows and columns of a matrix that the files hold once or twice, or not at all."""
    if not keys:
        return (0, 0)
    rows, columns = checkpoint.shapes[keys[0]]
    return rows, columns
