"""A GGUF file as a template: everything in it is kept, and the bytes of the matrices of a model are replaced.

So every architecture that llama.cpp's own converter knows can be written, with its keys and its tokenizer. Which tensor is
which matrix is found by value (matching.py): both sides in the dtype of the checkpoint, or, where the file was rounded from
it, the checkpoint rounded in the same way.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tawny.errors import CheckpointError, ModelError, OutputError, UserError
from tawny.exporting.matching import EMBEDDING, HEAD, Digests, Place, Slot, digests, match
from tawny.model import durable
from tawny.model.checkpoint import Checkpoint, Unit
from tawny.model.durable import writing
from tawny.model.gguf_header import open_gguf
from tawny.model.linears import Linear, linears_of
from tawny.model.structure import find_blocks, head_of
from tawny.packed.opening import open_checkpoint
from tawny.progress import Progress, silent
from tawny.run.place import same_place

Rows = npt.NDArray[np.uint8]  # [rows, bytes of one]

# The types that a template may have, and how a checkpoint may have been rounded to them: some converters go through floats.
_ROUNDINGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "F32": (("F32",),),
    "F16": (("F16",),),
    "BF16": (("BF16",),),
    "Q8_0": (("Q8_0",), ("F16", "Q8_0"), ("BF16", "Q8_0")),
}
_SET = ("general.file_type", "general.quantization_version")
_PIECE = 1 << 22  # weights or bytes that are held at a time
_UINT32 = 4  # of the types of GGUF's values


@dataclass(frozen=True)
class Payload:
    """The bytes that take the place of a matrix.

    Attributes:
        kind: GGUF's name of the type, `Q4_K`.
        rows: gives uint8 `[out, bytes of a row]`, rows in the order of the linear. Called once for each tensor that the matrix
            is in.
    """

    kind: str
    rows: Callable[[], Rows]


class Matrices:
    """The matrices of a checkpoint that is mapped to its model, by name: linears, experts, embedding, head.

    Those of one fused parameter are cheap to read one after the other.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        self.checkpoint, self.model = checkpoint, model
        blocks = find_blocks(model)
        self.linears: dict[str, Linear] = {
            linear.name: linear
            for name, block in zip(blocks.names, blocks.modules, strict=True)
            for linear in linears_of(block, name)
        }
        modules = {id(module): name for name, module in model.named_modules()}
        head = head_of(model)
        self.embedding = f"{modules[id(model.get_input_embeddings())]}.weight"
        self.head = None if head is None else f"{modules[id(head)]}.weight"
        self._units = {target: unit for unit in checkpoint.units for target in unit.targets}
        if self.head not in self._units:  # it is the embedding
            self.head = None
        self.names = [*self.linears, *(end for end in (self.embedding, self.head) if end is not None)]
        self._held: tuple[Unit | None, dict[str, Tensor]] = (None, {})

    @classmethod
    def of(cls, folder: Path) -> Matrices:
        """Those of a folder."""
        from tawny.model.skeleton import open_skeleton

        checkpoint, model = open_checkpoint(folder), open_skeleton(folder, torch.float32)
        checkpoint.map_to(model)
        return cls(checkpoint, model)

    def key(self, name: str) -> str:
        """The parameter that holds a matrix.

        Raises:
            ModelError: the model has no such matrix.
        """
        key = self.linears[name].key if name in self.linears else name
        key = key if key in self._units else f"{key}.weight"
        if key not in self._units:
            raise ModelError(f"{name!r} is not a matrix of {self.checkpoint.folder}")
        return key

    def unit(self, name: str) -> Unit:
        """The tensors of the file that a matrix is read from."""
        return self._units[self.key(name)]

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        if name in self.linears:
            return self.linears[name].shape
        rows, columns = self.model.get_parameter(self.key(name)).shape
        return int(rows), int(columns)

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype_of(self._units[self.key(name)].sources[0])

    def read(self, name: str) -> Tensor:
        """`[out, in]` as stored, a view of the parameter."""
        key = self.key(name)
        unit = self._units[key]
        if self._held[0] is not unit:
            self._held = (None, {})
            self._held = (unit, self.checkpoint.load(unit, self.model))
        value = self._held[1][key]
        return self.linears[name].view(value) if name in self.linears else value


@dataclass(frozen=True)
class _TemplateTensor:
    """A tensor of the template: `[…, height, width]` from byte `start` of the file on."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def width(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def height(self) -> int:
        """Rows of each matrix in it."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @property
    def matrices(self) -> int:
        return self.rows // self.height

    @property
    def bytes(self) -> int:
        return self.rows * _row_bytes(self.width, self.kind)


@dataclass(frozen=True)
class _Way:
    """How both sides are compared: in a dtype, or the checkpoint rounded to `kinds`, one after the other, as the last is stored."""

    dtype: torch.dtype | None = None
    kinds: tuple[str, ...] = ()

    def fits(self, kind: str, width: int) -> bool:
        if self.dtype is not None:
            return kind in _ROUNDINGS
        return self.kinds[-1] == kind and _fits(width, kind)

    def of_checkpoint(self, values_RI: Tensor) -> Rows:
        if self.dtype is not None:
            return _bytes_of(values_RI.to(self.dtype))
        numbers = values_RI.float().numpy()
        for kind in self.kinds[:-1]:
            numbers = _decoded(_encoded(numbers, kind), kind)
        return _encoded(numbers, self.kinds[-1])

    def of_template(self, rows: Rows, kind: str) -> Rows:
        return (
            rows if self.dtype is None else _bytes_of(torch.from_numpy(_decoded(rows, kind)).to(self.dtype))
        )


@dataclass(frozen=True)
class _Share:
    """What of a tensor one matrix takes: some rows, and for the first matrix in it what fills up the whole."""

    tensor: _TemplateTensor
    rows: int
    first: bool


class Template:
    """A GGUF file whose tensors are matched with the matrices of a dense checkpoint.

    Args:
        reader: of `gguf`, of the file.
        places: where each matrix stands that may be replaced, by its name.

    Attributes:
        architecture: as the file calls it.
        alike: names of matrices that must have one type, since they are in one tensor: the experts of a block.
        rest: bytes of a file apart from what `size_of` counts.
    """

    def __init__(self, path: Path, reader: Any, places: Mapping[str, list[Place]]) -> None:
        self.path, self.places = path, places
        self.architecture = str(reader.fields["general.architecture"].contents())
        self.alignment = int(reader.alignment)
        self.tensors = [_held(tensor) for tensor in reader.tensors]
        self._head, self._set = _head_of(reader)
        # Of each tensor name and dimensions, as the file has them.
        self._names = [b"".join(part.tobytes() for part in x.field.parts[:4]) for x in reader.tensors]
        tensors = {tensor.name: tensor for tensor in self.tensors}
        self._shares = {
            name: [_Share(tensors[place.slot[0]], place.rows, place.slot[1] == 0) for place in held]
            for name, held in places.items()
        }
        self._owners: dict[str, list[str]] = {}
        for name, shares in self._shares.items():
            for share in shares:
                self._owners.setdefault(share.tensor.name, []).append(name)
        for tensor, owners in self._owners.items():
            if len(owners) != tensors[tensor].matrices:
                raise ModelError(
                    f"{len(owners)} of the {tensors[tensor].matrices} matrices in {tensor!r} of {path} are wanted, first "
                    f"{owners[0]!r}; they have one type: choose all or none"
                )
        self.alike = list(dict.fromkeys(tuple(owners) for owners in self._owners.values() if len(owners) > 1))
        described = sum(len(name) + 12 for name in self._names)
        kept = [tensor for tensor in self.tensors if tensor.name not in self._owners]
        self.rest = self._padded(len(self._head) + described) + sum(self._padded(x.bytes) for x in kept)

    @classmethod
    def of(
        cls, path: Path, checkpoint: Checkpoint, model: Any, names: Sequence[str], progress: Progress = silent
    ) -> Template:
        """Find matrices of a checkpoint in a GGUF file.

        Args:
            checkpoint: mapped to `model`.
            names: linears (`Linear.name`), and the parameters of the embedding and the head.

        Raises:
            CheckpointError: the file cannot be read.
            ModelError: it is quantised, or a matrix is nowhere in it or could be two of its tensors: names the first.
        """
        reader = open_gguf(path)
        tensors = [_held(tensor) for tensor in reader.tensors]
        few = next((x for x in tensors if x.kind not in _ROUNDINGS and _sizes(x.kind)[0] > 1), None)
        if few is not None:
            raise ModelError(
                f"{path} is already quantised ({few.name!r} is {few.kind}); expected a template of {', '.join(_ROUNDINGS)}, as "
                "llama.cpp's convert_hf_to_gguf.py makes it"
            )
        if reader.byte_order != "I":
            raise ModelError(
                f"{path} is in the byte order of other machines; convert the model again on this one"
            )
        return cls(path, reader, _found(path, tensors, Matrices(checkpoint, model), names, progress))

    def kind_of(self, name: str) -> str | None:
        """The type that a matrix has in the template; None where it shares the tensor of another."""
        return self._shares[name][0].tensor.kind if self._shares[name] else None

    def size_of(self, name: str, kind: str) -> int:
        """Bytes that a matrix adds to `rest` in a GGUF type, filling included.

        Raises:
            ModelError: its width is not a multiple of what the type takes.
        """
        size = 0
        for share in self._shares[name]:
            if not _fits(share.tensor.width, kind):
                raise ModelError(
                    f"{name!r} is {share.tensor.width} wide, which {kind} does not take; give it another type"
                )
            each = _row_bytes(share.tensor.width, kind)
            size += share.rows * each + (-share.tensor.rows * each % self.alignment if share.first else 0)
        return size

    def bytes_with(self, kinds: Mapping[str, str]) -> int:
        """Bytes of the file when these matrices have these GGUF types, and others that of the template."""
        return self.rest + sum(
            self.size_of(name, kinds.get(name) or shares[0].tensor.kind)
            for name, shares in self._shares.items()
            if shares
        )

    def fill(self, out: Path, payloads: Mapping[str, Payload], progress: Progress = silent) -> dict[str, int]:
        """Write the file with these payloads, open it again and compare every tensor and key.

        Returns:
            How many tensors have each type.

        Raises:
            ModelError: experts of one tensor have several types, or only some of them a payload.
            OutputError: the file cannot be written, or is the template itself.
        """
        if same_place(out, self.path):
            raise OutputError(
                f"{out} is the template itself; a source is never overwritten: choose another --out"
            )
        kinds = [self._kind(tensor, payloads) for tensor in self.tensors]
        size = self.bytes_with({name: payload.kind for name, payload in payloads.items()})
        with writing(out), durable.beside(out) as temporary:
            written = self._write(temporary, kinds, payloads, progress)
            wrong = next(self._differing(temporary, kinds, written, size, progress), None)
            if wrong is not None:
                raise CheckpointError(
                    f"{wrong} in the file is not what was meant; nothing was kept: report this"
                )
        return dict(Counter(kinds))

    def _padded(self, size: int) -> int:
        return size + -size % self.alignment

    def _kind(self, tensor: _TemplateTensor, payloads: Mapping[str, Payload]) -> str:
        """The type that a tensor gets."""
        owners = self._owners.get(tensor.name, [])
        kinds = {payloads[name].kind if name in payloads else "" for name in owners}
        if len(kinds) > 1:
            said = ", ".join(sorted(kind or "none" for kind in kinds))
            raise ModelError(f"matrices of {tensor.name!r} have several types ({said}); expected one for all")
        return next(iter(kinds), "") or tensor.kind

    def _write(
        self, path: Path, kinds: Sequence[str], payloads: Mapping[str, Payload], progress: Progress
    ) -> list[bytes]:
        """Returns a digest of the bytes of each tensor."""
        import gguf

        sizes = [
            tensor.rows * _row_bytes(tensor.width, kind)
            for tensor, kind in zip(self.tensors, kinds, strict=True)
        ]
        fillers = {
            place.slot: (payload, place) for name, payload in payloads.items() for place in self.places[name]
        }
        written, offset = [], 0
        progress.phase("filling", len(kinds), "tensors")
        with path.open("wb") as file, self.path.open("rb") as source:
            file.write(self._headed(kinds))
            for name, kind, size in zip(self._names, kinds, sizes, strict=True):
                file.write(name + struct.pack("<IQ", gguf.GGMLQuantizationType[kind], offset))
                offset += self._padded(size)
            file.write(bytes(-file.tell() % self.alignment))
            for tensor, kind in zip(self.tensors, kinds, strict=True):
                digest = hashlib.blake2b()
                for piece in self._pieces(tensor, kind, fillers, source):
                    digest.update(piece)
                    file.write(piece)
                file.write(bytes(-file.tell() % self.alignment))
                written.append(digest.digest())
                progress.step(tensor.name)
        return written

    def _pieces(
        self,
        tensor: _TemplateTensor,
        kind: str,
        fillers: Mapping[Slot, tuple[Payload, Place]],
        source: BufferedReader,
    ) -> Iterator[bytearray | memoryview]:
        """The bytes of a tensor: of payloads, or as they are."""
        if (tensor.name, 0) not in fillers:
            yield from _read(source, tensor.start, tensor.bytes)
            return
        for index in range(tensor.matrices):
            payload, place = fillers[tensor.name, index]
            rows = payload.rows()
            expected = (place.whole, _row_bytes(tensor.width, kind))
            if rows.dtype != np.uint8 or rows.shape != expected:
                raise CheckpointError(
                    f"the payload of {tensor.name!r} is {rows.dtype} {list(rows.shape)}; expected uint8 {list(expected)}"
                )
            yield np.ascontiguousarray(rows if place.order is None else rows[place.order]).data

    def _headed(self, kinds: Sequence[str]) -> bytes:
        """The head, with what is said of the types set."""
        import gguf

        inside = Counter(
            kind
            for tensor, kind in zip(self.tensors, kinds, strict=True)
            if len(tensor.shape) > 1 and tensor.name not in (EMBEDDING, HEAD)
        )
        head = bytearray(self._head)
        for key, value in zip(
            _SET,
            (file_type(inside.most_common(1)[0][0] if inside else "F32"), gguf.GGML_QUANT_VERSION),
            strict=True,
        ):
            start, size = self._set[key]
            head[start : start + size] = int(value).to_bytes(size, "little")
        return bytes(head)

    def _differing(
        self, path: Path, kinds: Sequence[str], written: Sequence[bytes], size: int, progress: Progress
    ) -> Iterator[str]:
        """Open the file again, and name what is not as it was meant to be."""
        reader, head = open_gguf(path), self._headed(kinds)
        if path.stat().st_size != size:
            yield "the number of bytes"
        progress.phase("comparing", len(kinds), "tensors")
        with path.open("rb") as file:
            if file.read(len(head)) != head:
                yield "a key"
            for index, (tensor, found) in enumerate(zip(self.tensors, reader.tensors, strict=True)):
                held, digest = _held(found), hashlib.blake2b()
                for piece in _read(file, held.start, held.bytes):
                    digest.update(piece)
                same = (held.name, held.kind, held.shape) == (tensor.name, kinds[index], tensor.shape)
                if not same or digest.digest() != written[index]:
                    yield repr(tensor.name)
                progress.step(tensor.name)


def _held(tensor: Any) -> _TemplateTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return _TemplateTensor(tensor.name, tensor.tensor_type.name, shape, int(tensor.data_offset))


def _head_of(reader: Any) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes in front of the descriptions of tensors, and where in them the values are that are set; those absent are added."""
    end = reader.tensors[0].field.offset if reader.tensors else reader.data_offset
    head, where, added = bytearray(reader.data[:end].tobytes()), {}, 0
    for key in _SET:
        if key in reader.fields:
            *before, value = reader.fields[key].parts
            where[key] = (
                reader.fields[key].offset + sum(int(part.nbytes) for part in before),
                int(value.nbytes),
            )
        else:
            head += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", _UINT32, 0)
            where[key] = (len(head) - 4, 4)
            added += 1
    count = reader.fields["GGUF.kv_count"]
    struct.pack_into("<Q", head, count.offset, int(count.parts[0][0]) + added)
    return bytes(head), where


def file_type(kind: str) -> int:
    """What `general.file_type` calls a file of a type."""
    from gguf import LlamaFileType

    names = (f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", f"ALL_{kind}", "GUESSED")
    return next(int(LlamaFileType[name]) for name in names if name in LlamaFileType.__members__)


def _found(
    path: Path, tensors: Sequence[_TemplateTensor], source: Matrices, names: Sequence[str], progress: Progress
) -> dict[str, list[Place]]:
    """Where each matrix stands.

    Raises:
        ModelError: one is nowhere, or could be two tensors.
    """
    dtypes = dict.fromkeys(source.dtype(name) for name in names)
    kinds = dict.fromkeys(x.kind for x in tensors if len(x.shape) > 1)
    ways = [_Way(dtype) for dtype in dtypes]
    ways += [_Way(kinds=rounding) for kind in kinds for rounding in _ROUNDINGS.get(kind, ())]
    ends: dict[str, tuple[str, ...]] = {}
    for key, held in (
        (source.embedding, (EMBEDDING, *([HEAD] if source.head is None else []))),
        (source.head, (HEAD,)),
    ):
        ends |= {name: held for name in names if source.key(name) == key}
    places: dict[str, list[Place]] = {}
    for way in ways:
        left = [name for name in names if name not in places]
        taken = {place.slot for held in places.values() for place in held}
        if not left:
            break
        widths = {source.shape(name)[1] for name in left}
        progress.phase("matching", len(left) + len(tensors), "tensors")
        theirs: dict[Slot, Digests] = {}
        with path.open("rb") as file:
            for tensor in tensors:
                if len(tensor.shape) > 1 and tensor.width in widths and way.fits(tensor.kind, tensor.width):
                    hashed = _of_tensor(file, tensor, way).reshape(tensor.matrices, tensor.height)
                    theirs |= {(tensor.name, index): rows for index, rows in enumerate(hashed)}
                progress.step(tensor.name)
        ours: dict[str, Digests] = {}
        for name in left:
            if way.dtype in (None, source.dtype(name)):
                ours[name] = _of_matrix(source.read(name), way)
            progress.step(name)
        places |= match(ours, {slot: rows for slot, rows in theirs.items() if slot not in taken}, ends)
    absent = next((name for name in names if name not in places), None)
    if absent is not None:
        raise ModelError(
            f"{path} holds no tensor with the values of {absent!r}; expected a template of the same model, with all of its weights"
        )
    return {name: places[name] for name in names}


def _of_tensor(file: BufferedReader, tensor: _TemplateTensor, way: _Way) -> Digests:
    each = _row_bytes(tensor.width, tensor.kind)
    count = max(1, _PIECE // tensor.width)
    pieces = [
        digests(way.of_template(np.frombuffer(piece, np.uint8).reshape(-1, each), tensor.kind))
        for piece in _read(file, tensor.start, tensor.bytes, count * each)
    ]
    return np.concatenate(pieces)


def _of_matrix(values_OI: Tensor, way: _Way) -> Digests:
    count = max(1, _PIECE // values_OI.shape[1])
    return np.concatenate([digests(way.of_checkpoint(rows)) for rows in torch.split(values_OI, count)])


def _read(file: BufferedReader, start: int, size: int, most: int = _PIECE) -> Iterator[bytearray]:
    """Bytes of a file, some at a time."""
    file.seek(start)
    for done in range(0, size, most):
        piece = bytearray(min(most, size - done))  # which torch may call writable
        if file.readinto(piece) < len(piece):
            raise CheckpointError(f"{file.name} ends before its tensors do; fetch it again")
        yield piece


def _bytes_of(values_RI: Tensor) -> Rows:
    """Rows as bytes; a zero has no sign, so that both sides agree on it."""
    whole: Rows = (values_RI + 0).contiguous().view(torch.uint8).numpy()
    return whole


def _encoded(numbers: npt.NDArray[np.float32], kind: str) -> Rows:
    import gguf

    with np.errstate(over="ignore"):  # what F16 does not hold equals nothing
        encoded = gguf.quantize(np.ascontiguousarray(numbers), gguf.GGMLQuantizationType[kind])
    rows: Rows = encoded.view(np.uint8).reshape(len(numbers), -1)
    return rows


def _decoded(rows: Rows, kind: str) -> npt.NDArray[np.float32]:
    import gguf

    numbers: npt.NDArray[np.float32] = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
    return numbers


@lru_cache
def _sizes(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block of a type.

    Raises:
        UserError: GGUF has no such type.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in GGMLQuantizationType.__members__:
        raise UserError(f"{kind!r} is not a GGUF type; expected one such as Q8_0")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(block), int(size)


def _fits(width: int, kind: str) -> bool:
    return width % _sizes(kind)[0] == 0


def _row_bytes(width: int, kind: str) -> int:
    block, size = _sizes(kind)
    return width // block * size
