"""The packed folder: safetensors shards, and an index that knows the hash, place and shape of every tensor.

docs/packed-format.md specifies it. `PackedFolder` opens one and refuses, by tensor name, whatever does not fit:
sizes, shapes and offsets at open, hashes and mask populations when tensors are read or `verify` is called.
`PackedCheckpoint` reads the same folder as the dense checkpoint it was made from, one tensor at a time, so that
evaluation, inspection and profiling stream through it like through any other. writer.py writes one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, StrictBool, ValidationError
from torch import Tensor

from tawny.checked import adapter, one_line_of
from tawny.errors import CheckpointError, UserError
from tawny.kinds import KINDS
from tawny.model.checkpoint import PACKED_INDEX as INDEX
from tawny.model.checkpoint import Checkpoint
from tawny.model.tensorfile import DTYPES, NAMES, TensorEntry
from tawny.model.tensorfile import entries as tensors_in
from tawny.packed import checking, format
from tawny.packed.format import PackedForm, PackedTensor

logger = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=0, strict=True)]


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}")
    return dtype


Dtype = Annotated[str, AfterValidator(_known)]


def header_of(path: Path) -> str:
    """The JSON that precedes the data of a safetensors file, as it stands there."""
    tensors_in(path)  # says what is wrong with a damaged one
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are different, and words."""
    for key, _ in pairs:
        key.encode()
    if len(once := dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return once


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, as the index has it; `offset` and `bytes` are of the file `shard`."""

    dtype: Dtype
    shape: list[Count]
    shard: str
    offset: Count
    bytes: Count
    sha256: str


@dataclass(frozen=True)
class SourceFile:
    """A file of the dense checkpoint: its name, and the JSON that it began with."""

    file: str
    header: str

    def entries(self) -> dict[str, dict[str, Any]]:
        """Its tensors; whatever is wrong with a header that safetensors would not read is raised."""
        self.header.encode()
        entries: dict[str, dict[str, Any]] = json.loads(self.header, object_pairs_hook=_once)
        metadata: Any = entries.pop("__metadata__", None)
        if not self.header.startswith("{"):
            raise ValueError("a header of the dense checkpoint begins with something else than a brace")
        if metadata is not None:
            "".join(metadata.values()).encode()
        place = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if not all(type(number) is int for number in (begin, end, *entry["shape"])) or begin != place:
                raise ValueError(
                    f"{key!r} does not begin in the dense checkpoint where the one before it ends"
                )
            place = end
        return entries


@dataclass(frozen=True)
class PackedLinearEntry:
    """One packed weight of a folder.

    Attributes:
        sources: names of the tensors it was made from, in the dense checkpoint (two where a tied pair was stored twice).
        rows: of an expert whose projections are stored apart: how many rows each of `sources` has, which follow each other.
        index: of an expert that is stored together with others: its place in the one source.
        whole: nothing was removed, and there are no offsets.
        short: scales are stored in eight bits (kernels/scales.py).
        transposed: the dense checkpoint stores `[in, out]`.
        storage: safetensors name of the type the dense checkpoint stores.
        embedding: module path of the embedding that is served from this weight, if any.
    """

    name: str
    shape: tuple[Count, Count]
    values: str
    group: Count | None
    nnz: Count
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    transposed: StrictBool
    storage: Dtype
    embedding: str | None = None
    rows: tuple[Annotated[int, Field(gt=0, strict=True)], ...] | None = None
    index: Count | None = None
    whole: StrictBool = False
    short: StrictBool = False

    @property
    def form(self) -> PackedForm:
        return PackedForm(self.shape, self.values, self.group, self.nnz, self.whole, self.short)

    @property
    def parameter(self) -> str | None:
        """The fused parameter that an expert is part of; None for a weight that is not an expert's."""
        return None if self.rows is None and self.index is None else self.name.rpartition(".")[0]

    def shape_of(self, source: str | None = None) -> tuple[int, int]:
        """As it is stored in the dense checkpoint; or of that part of it which is in one of its sources."""
        out = self.shape[0]
        if source is not None and self.rows is not None:
            out = self.rows[self.sources.index(source)]
        return (self.shape[1], out) if self.transposed else (out, self.shape[1])

    def part_of(self, source: str, W_OI: Tensor) -> Tensor:
        """What a tensor of the dense checkpoint holds of this weight, as it is stored there."""
        if self.rows is not None:
            W_OI = torch.split(W_OI, list(self.rows))[self.sources.index(source)]
        return W_OI.T.contiguous() if self.transposed else W_OI

    def to_dict(self) -> dict[str, Any]:
        facts = {key: list(fact) if isinstance(fact, tuple) else fact for key, fact in vars(self).items()}
        absent = {"name"} | {
            key for key in ("rows", "index", "whole", "short") if facts[key] is None or facts[key] is False
        }
        return {key: fact for key, fact in facts.items() if key not in absent}

    @property
    def full(self) -> bool:
        """Every weight is there, and memory holds masks that the file does without."""
        return not self.whole and self.nnz == self.shape[0] * self.shape[1]

    def wanted(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors that are stored, by name: those of the format, without masks where every weight is there."""
        shapes = self.form.tensors()
        if self.full:
            del shapes["masks"]
        return shapes


@dataclass(frozen=True)
class _Index:
    """The index of a folder. Those of old know no hash of the configuration."""

    tensors: dict[str, StoredTensor]
    shards: dict[str, Count]
    dense: list[str]
    source: list[SourceFile]
    source_index: str | None
    linears: dict[str, PackedLinearEntry]
    weight_map: dict[str, str]
    config_sha256: str | None = None


@functools.cache  # a folder is opened more than once by one call
def _say_changed(path: Path, found: str) -> None:
    logger.warning("%s is not the one that was packed: the model may compute other numbers", path)


class PackedFolder:
    """An open packed folder: its index has been compared with its files.

    Raises:
        CheckpointError: names the file or tensor that is missing, cut short, or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            version = index["metadata"]["version"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is missing or not an index of a packed folder ({error}); pack the model again"
            ) from error
        if version != format.VERSION:
            raise CheckpointError(f"{folder}: {format.of_another(version)}")
        try:
            named = {name: {**entry, "name": name} for name, entry in index["linears"].items()}
            known: _Index = adapter(_Index).validate_python({**index, "linears": named})
            self.tensors, self.shards, self.linears = known.tensors, known.shards, known.linears
            self.dense, self.source, self.source_index = known.dense, known.source, known.source_index
            for linear in self.linears.values():
                self._check_linear(linear)
            # What each tensor of the dense checkpoint became.
            self.made: dict[str, list[PackedLinearEntry]] = {}
            for linear in self.linears.values():
                for source in linear.sources:
                    self.made.setdefault(source, []).append(linear)
            self.experts = self._experts()
            self.packed_names = {f"{e.name}.{key}" for e in self.linears.values() for key in e.wanted()}
            self._check_files()
            self._check_whole(known.weight_map)
            self._compare_config(known.config_sha256)
        except CheckpointError:
            raise
        except ValidationError as error:
            raise CheckpointError(f"{path} is damaged ({one_line_of(error)}); pack the model again") from None
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
            OSError,
            UserError,
        ) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); pack the model again") from error

    def _compare_config(self, packed: str | None) -> None:
        """A changed config.json is the user's right, and gives other numbers."""
        path = self.folder / "config.json"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if packed not in (None, digest):
            _say_changed(path, digest)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.tensors.values())

    def _check_linear(self, entry: PackedLinearEntry) -> None:
        """What the index says of a packed weight fits together, and its tensors have the types and shapes that follow from it."""
        name, rows, sources = entry.name, entry.rows, entry.sources
        if entry.whole and not KINDS[entry.values].scaled:
            raise ValueError(f"{name}: whole, and {entry.values} are floats")
        if entry.short and entry.group is None:
            raise ValueError(f"{name}: short scales without a group")
        if rows is not None:
            fits = entry.index is None and len(rows) == len(sources) == len(set(sources))
            if not fits or sum(rows) != entry.shape[0]:
                raise ValueError(f"{name}: rows {rows} of {entry.shape[0]}, sources {sources}")
        if entry.index is not None and len(sources) != 1:
            raise ValueError(f"{name}: index {entry.index} in {sources}")
        if entry.parameter is not None and entry.embedding is not None:
            raise ValueError(f"{name}: an expert, with embedding {entry.embedding!r}")
        for key, (dtype, shape) in entry.wanted().items():
            tensor = self.tensors.get(f"{name}.{key}")
            if tensor is None or DTYPES[tensor.dtype] != dtype or tuple(tensor.shape) != shape:
                stored = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
                raise self._refuse(f"{name}.{key}", f"{stored} where {NAMES[dtype]} {list(shape)} belongs")

    def _experts(self) -> dict[str, list[PackedLinearEntry]]:
        """Experts by the fused parameter they are part of, in their order."""
        experts: dict[str, dict[str, PackedLinearEntry]] = {}
        for entry in self.linears.values():
            if entry.parameter is not None:
                experts.setdefault(entry.parameter, {})[entry.name] = entry
        ordered = {
            key: [entries[f"{key}.{number}"] for number in range(len(entries))]
            for key, entries in experts.items()
        }
        for key, entries in ordered.items():
            if len({(e.shape, e.transposed, e.storage, e.rows) for e in entries}) > 1:
                raise ValueError(f"the experts of {key} are of several shapes or types")
            if any(entry.index not in (None, number) for number, entry in enumerate(entries)):
                raise ValueError(f"the experts of {key} are not in the order of their source")
        return ordered

    def _refuse(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: tensor {name!r}: {what}; the packed folder is damaged: copy or pack it again"
        )

    def _check_whole(self, shards: Mapping[str, str]) -> None:
        """Every tensor of the dense checkpoint is packed or stored, once, and nothing else is.

        A weight that the index forgot would come up as random numbers in transformers.
        """
        if shards != {name: entry.shard for name, entry in self.tensors.items()}:
            raise ValueError("weight_map and tensors differ")
        sources = dict(self.made)
        for source, entries in sources.items():
            places: list[Any] = [entry.index for entry in entries]
            if places != [None] and set(places) != set(range(len(entries))):
                raise ValueError(f"two weights have one source, {source!r}, or one of its experts has none")
        left = set(self.tensors) - self.packed_names
        self._check_source_files()
        for part in self.source:
            for key, header in part.entries().items():
                entries = sources.pop(key, [])
                begin, end = header["data_offsets"]
                shape, dtype = header["shape"], header["dtype"]
                if entries:
                    together = [len(entries)] if entries[0].index is not None else []
                    fits = all(
                        (shape, dtype) == ([*together, *entry.shape_of(key)], entry.storage)
                        for entry in entries
                    )
                elif key in left:
                    left.remove(key)
                    stored = self.tensors[key]
                    fits = (shape, dtype) == (stored.shape, stored.dtype)
                else:
                    raise self._refuse(
                        key, "is neither packed nor stored, though the dense checkpoint had it"
                    )
                if not fits or end - begin != torch.Size(shape).numel() * DTYPES[dtype].itemsize:
                    raise self._refuse(
                        key, f"has {dtype} {shape} in the dense checkpoint and something else here"
                    )
        if sources:
            raise self._refuse(
                next(iter(sources)), "is packed, though the dense checkpoint had no such tensor"
            )
        if left:
            raise self._refuse(min(left), "belongs to no weight of the index")

    def _check_source_files(self) -> None:
        """The dense checkpoint's files are those that its index names, or stand without one, in one folder."""
        names = [part.file for part in self.source]
        for name in names:
            name.encode()
            if "\0" in name or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"source names a file {name!r}")
        if self.source_index is not None:
            self.source_index.encode()
            named = {str(Path(name)) for name in json.loads(self.source_index)["weight_map"].values()}
        else:
            named = {"model.safetensors"} if "model.safetensors" in names else set(names)
        if not names or len(set(names)) < len(names) or named != set(names):
            raise ValueError("source names other files than the dense checkpoint had")

    def _check_files(self) -> None:
        by_shard: dict[str, list[str]] = {shard: [] for shard in self.shards}
        for name, entry in self.tensors.items():
            if entry.shard not in by_shard:
                raise self._refuse(name, f"its shard {entry.shard!r} is not in the index")
            by_shard[entry.shard].append(name)
        for shard, names in by_shard.items():
            path = self.folder / shard
            if not names:
                raise CheckpointError(
                    f"{self.folder}: no tensor of the index lies in its shard {shard}; "
                    "the packed folder is damaged: copy or pack it again"
                )
            if Path(shard).name != shard or not path.is_file():
                raise self._refuse(names[0], f"its shard {shard} is missing")
            size = path.stat().st_size
            if size != self.shards[shard]:
                ends = {n: self.tensors[n].offset + self.tensors[n].bytes for n in names}
                cut = min((n for n in names if ends[n] > size), key=ends.__getitem__, default=names[0])
                raise self._refuse(cut, f"{shard} has {size} bytes where {self.shards[shard]} belong")
            tensors = tensors_in(path)
            for name in names:
                self._check_place(name, tensors.pop(name, None))
            if tensors:
                raise self._refuse(next(iter(tensors)), f"is in {shard} and not in the index")

    def _check_place(self, name: str, found: TensorEntry | None) -> None:
        entry = self.tensors[name]
        if found is None:
            raise self._refuse(name, f"is not in {entry.shard}")
        for key, own in ("dtype", found.dtype), ("shape", list(found.shape)), ("offset", found.start):
            if own != vars(entry)[key]:
                raise self._refuse(name, f"has {key} {own} where {vars(entry)[key]} belongs")
        size = torch.Size(entry.shape).numel() * DTYPES[entry.dtype].itemsize
        if not entry.bytes == size == found.bytes:
            raise self._refuse(name, f"has {found.bytes} bytes, its shape needs another number")

    def verify(self) -> None:
        """Compare the SHA-256 of every tensor with the index, on torch's threads: hashing releases Python's lock."""
        names = sorted(self.tensors, key=lambda name: (self.tensors[name].shard, self.tensors[name].offset))
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(self._verify, names))

    def _verify(self, name: str) -> None:
        entry = self.tensors[name]
        digest, left = hashlib.sha256(), entry.bytes
        with (self.folder / entry.shard).open("rb") as file:
            file.seek(entry.offset)
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
        self._compare(name, digest.hexdigest())

    def _compare(self, name: str, found: str) -> None:
        if found != self.tensors[name].sha256:
            raise self._refuse(name, "its SHA-256 is not the one in the index")

    def read(self, name: str) -> Tensor:
        """One tensor, copied out of its file and compared with its hash."""
        entry = self.tensors[name]
        buffer = bytearray(entry.bytes)
        with (self.folder / entry.shard).open("rb") as file:
            file.seek(entry.offset)
            if file.readinto(buffer) != len(buffer):
                raise self._refuse(name, "its file ends too early")
        self._compare(name, hashlib.sha256(buffer).hexdigest())
        if not buffer:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        return torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]).view(entry.shape)

    def read_source(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the dense checkpoint whose weights are packed; in the type of their values if `dtype` is None."""
        whole: Tensor | None = None
        for entry in self.made[key]:
            part = entry.part_of(key, format.unpack(self.read_packed(entry.name), dtype))
            if entry.index is None:
                return part
            if whole is None:
                whole = part.new_empty(len(self.made[key]), *part.shape)
            whole[entry.index] = part
        assert whole is not None
        return whole

    def read_packed(self, name: str) -> PackedTensor:
        """One packed weight, checked."""
        entry = self.linears[name]
        tensors = {key: self.read(f"{name}.{key}") for key in entry.wanted()}
        if entry.full:
            tensors = {"masks": format.full_masks(entry.shape), **tensors}
        packed = PackedTensor(tensors, entry.shape, entry.values, entry.group)
        checking.check(packed, name)
        return packed


class PackedCheckpoint(Checkpoint):
    """A packed folder read as the dense checkpoint it was made from.

    float kinds come back in their own type, integers as the float32 numbers they stand for.
    """

    def __init__(self, folder: Path) -> None:
        self._begin(folder)
        self.packed = PackedFolder(folder)
        for part in self.packed.source:
            for key, entry in part.entries().items():
                self.shapes[key] = tuple(entry["shape"])
                if key in self.packed.made:
                    kind = KINDS[self.packed.made[key][0].values]
                    self.files[key] = folder / INDEX
                    self.dtypes[key] = "F32" if kind.scaled else NAMES[kind.dtype]
                else:
                    self.files[key] = folder / self.packed.tensors[key].shard
                    self.dtypes[key] = entry["dtype"]

    @property
    def stored_as(self) -> str:
        kinds = sorted({entry.values for entry in self.packed.linears.values()})
        return f"packed {' and '.join(kinds)}" if kinds else super().stored_as

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        packed = self.packed
        return {key: packed.read_source(key) if key in packed.made else packed.read(key) for key in keys}
