"""The packed weight: a bit mask plus the surviving values, and nothing else.

A weight W [out, in] is cut into groups of 4 rows. For each 64 columns a group holds four 64-bit masks, one a row, and
the survivors of those four rows one after another; all masks lie in one tensor, all values in another, and one offset
a group says where its values begin. docs/packed-format.md is the specification, precise enough to write a reader from.

What is promised: `unpack(pack(W))` is W bit for bit for the float kinds (after the cast to that kind), −0.0 and NaN
payloads included, because a survivor is a weight with any bit set, not a weight that differs from zero. int8 values
carry a float32 scale a row, or a bfloat16 scale for each 128 columns of a row; every survivor stays a survivor even
when it rounds to 0, so the mask of a pruned weight is never lost. One format serves 0-100 % sparsity and n:m.

Shapes: O out, I in, G = ceil(O/4) groups, B = ceil(I/64) blocks of columns, S = ceil(I/128) spans.
"""

from __future__ import annotations

__all__ = [
    "VERSION",
    "PackedTensor",
    "cheaper_whole",
    "check",
    "check_dtype",
    "full_masks",
    "naming",
    "pack",
    "packed_bytes",
    "shapes",
    "unpack",
]

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tawny.errors import CheckpointError, NumericalError, UserError

VERSION = 1
ROWS = 4  # rows of a group
COLUMNS = 64  # columns of a block: one mask word
SPAN = 128  # columns a scale covers when it does not cover the row
PADDING = 64  # bytes after the last value, because kernels load whole vectors

Values = Literal["bf16", "f16", "f32", "int8"]
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "int8": torch.int8,
}
_INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class PackedTensor:
    """One packed weight: its tensors by name and what is needed to read them.

    tensors: `masks` int64 [G, B, 4], `values` [nnz + padding], `offsets` int64 [G + 1]; with int8 also
    `scales` (float32 [4G], or bfloat16 [G, S, 4] with group 128) and `sums` float32 [4G].
    """

    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    values: Values
    group: int | None = None
    version: int = VERSION

    @property
    def nnz(self) -> int:
        return int(self.tensors["offsets"][-1])

    @property
    def density(self) -> float:
        return self.nnz / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def metadata(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        return {
            "version": self.version,
            "shape": list(self.shape),
            "values": self.values,
            "group": self.group,
        }

    @staticmethod
    def from_parts(
        tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], name: str = "weight"
    ) -> PackedTensor:
        """The inverse of `tensors` and `metadata()`; refuses a version it does not know. Does not check contents."""
        version = metadata.get("version")
        if version != VERSION:
            raise CheckpointError(
                f"{name}: packed format version {version!r}, this Tawny reads version {VERSION}; use a newer Tawny"
            )
        out, columns = metadata["shape"]
        return PackedTensor(
            dict(tensors), (int(out), int(columns)), metadata["values"], metadata.get("group"), version
        )


def _known(values: str, group: int | None) -> None:
    if values not in DTYPES:
        raise UserError(
            f"packed values {values!r} are not known; choose one of {', '.join(get_args(Values))}"
        )
    if group not in (None, SPAN):
        raise UserError(f"group {group!r} is not possible; scales cover a row (None) or {SPAN} columns")
    if group is not None and values != "int8":
        raise UserError(f"group {group} goes with int8 values, not with {values}")


def shapes(
    shape: tuple[int, int], values: Values, group: int | None, nnz: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor a packed weight of `nnz` survivors consists of."""
    _known(values, group)
    out, columns = shape
    groups, blocks = -(-out // ROWS), -(-columns // COLUMNS)
    dtype = DTYPES[values]
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "masks": (torch.int64, (groups, blocks, ROWS)),
        "values": (dtype, (nnz + PADDING // dtype.itemsize,)),
        "offsets": (torch.int64, (groups + 1,)),
    }
    if values == "int8":
        row, span = (groups * ROWS,), (groups, -(-columns // SPAN), ROWS)
        found["scales"] = (torch.bfloat16, span) if group else (torch.float32, row)
        found["sums"] = (torch.float32, row)
    return found


def packed_bytes(shape: tuple[int, int], values: Values, group: int | None, nnz: int) -> int:
    """Bytes a weight would take when packed."""
    total = 0
    for dtype, size in shapes(shape, values, group, nnz).values():
        total += torch.Size(size).numel() * dtype.itemsize
    return total


def _interleave(W_OI: Tensor) -> Tensor:
    """[O, I] → [G, B, 4, 64], zero where it is padded: the order in which everything is stored."""
    out, columns = W_OI.shape
    padded = torch.nn.functional.pad(W_OI, (0, -columns % COLUMNS, 0, -out % ROWS))
    return (
        padded.view(padded.shape[0] // ROWS, ROWS, padded.shape[1] // COLUMNS, COLUMNS)
        .transpose(1, 2)
        .contiguous()
    )


def _deinterleave(W_GBRC: Tensor, shape: tuple[int, int]) -> Tensor:
    groups, blocks = W_GBRC.shape[:2]
    whole = W_GBRC.transpose(1, 2).reshape(groups * ROWS, blocks * COLUMNS)
    return whole[: shape[0], : shape[1]].contiguous()


_SHIFTS = torch.arange(8, dtype=torch.uint8)


def _bits_to_masks(kept_GBRC: Tensor) -> Tensor:
    """bool [G, B, 4, 64] → int64 [G, B, 4]; bit k of a word is column k, bytes little-endian."""
    octets = kept_GBRC.view(*kept_GBRC.shape[:-1], 8, 8).to(torch.uint8) << _SHIFTS.to(kept_GBRC.device)
    return octets.sum(-1, dtype=torch.uint8).view(torch.int64).squeeze(-1)


def _masks_to_bits(masks_GBR: Tensor) -> Tensor:
    octets = masks_GBR.contiguous().unsqueeze(-1).view(torch.uint8)
    return ((octets.unsqueeze(-1) >> _SHIFTS.to(octets.device)) & 1).to(torch.bool).flatten(-2)


def cheaper_whole(density: float, values: Values) -> bool:
    """True where storing the zeros as values takes fewer bytes than a mask that says where they are."""
    return (1 - density) * DTYPES[values].itemsize < 1 / 8


def full_masks(shape: tuple[int, int]) -> Tensor:
    """The masks of a weight of which nothing is dropped: every bit of a row and column that exist."""
    out, columns = shape
    groups, blocks = -(-out // ROWS), -(-columns // COLUMNS)
    masks = torch.full((groups, blocks, ROWS), -1, dtype=torch.int64)
    if columns % COLUMNS:
        masks[:, -1] = (1 << columns % COLUMNS) - 1
    if out % ROWS:
        masks[-1, :, out % ROWS :] = 0
    return masks


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside, what is refused to be packed is refused by name; the functions here see nothing but a tensor."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from error


def check_dtype(W_OI: Tensor) -> None:
    """Refuse what is not a weight by itself: integers, and floats of 8 bits, whose scales are somewhere else."""
    if not W_OI.is_floating_point() or W_OI.dtype.itemsize < 2:
        raise UserError(
            f"a weight to pack is a float tensor of 16 bits or more, not {W_OI.dtype}; dequantise it first"
        )


def pack(
    W_OI: Tensor, values: Values = "bf16", group: int | None = None, whole: bool = False
) -> PackedTensor:
    """Pack a dense weight with zeros. The weight is first cast to `values`; what is then all zero bits is dropped.

    With `whole` nothing is dropped: for weights with hardly any zeros, whose file can then do without masks.

    Raises:
        NumericalError: a finite weight is too large for `values`, or one that should become int8 is not finite.
    """
    _known(values, group)
    if W_OI.dim() != 2 or 0 in W_OI.shape:
        raise UserError(f"a packed weight is a matrix with at least one weight, not {tuple(W_OI.shape)}")
    check_dtype(W_OI)
    W_OI = W_OI.detach().cpu()
    shape = (W_OI.shape[0], W_OI.shape[1])
    if values == "int8":
        return _pack_int8(W_OI, shape, group, whole)
    cast_OI = W_OI.to(DTYPES[values])
    if torch.finfo(DTYPES[values]).max < torch.finfo(W_OI.dtype).max:
        _refuse_overflow(W_OI, cast_OI, values)
    # Moved as integers: torch sends a lone float through a scalar and loses the payload of a NaN.
    bits_GBRC = _interleave(cast_OI.view(_INTEGER[DTYPES[values]]))
    tensors = _assemble(_masks_to_bits(full_masks(shape)) if whole else bits_GBRC != 0, bits_GBRC)
    tensors["values"] = tensors["values"].view(DTYPES[values])
    return PackedTensor(tensors, shape, values)


def _refuse_overflow(W_OI: Tensor, cast_OI: Tensor, values: Values) -> None:
    """Infinity that was there before is the checkpoint's own and is kept bit for bit; more of it is a loss."""
    lost_OI = cast_OI.isinf() & W_OI.isfinite()
    if lost_OI.any():
        raise NumericalError(
            f"a weight of shape {tuple(W_OI.shape)} holds {float(W_OI[lost_OI][0]):.4g}, which is infinity in {values}; "
            "pack it with values that hold it (f32, or bf16 for weights in bfloat16)"
        )


def _assemble(kept_GBRC: Tensor, W_GBRC: Tensor) -> dict[str, Tensor]:
    counts = kept_GBRC.flatten(1).sum(1)
    offsets = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    padding = W_GBRC.new_zeros(PADDING // W_GBRC.element_size())
    survivors = torch.cat([W_GBRC[kept_GBRC], padding])
    return {"masks": _bits_to_masks(kept_GBRC), "values": survivors, "offsets": offsets}


def _pack_int8(W_OI: Tensor, shape: tuple[int, int], group: int | None, whole: bool) -> PackedTensor:
    if not torch.isfinite(W_OI).all():
        raise NumericalError(f"a weight of shape {shape} holds NaN or infinity and cannot become int8")
    if W_OI.dtype is torch.float64:
        _refuse_overflow(W_OI, W_OI.float(), "f32")
    W_GBRC = _interleave(W_OI.float())
    # −0.0 was a survivor of pruning: keep its place in the mask
    kept = _masks_to_bits(full_masks(shape)) if whole else W_GBRC.view(torch.int32) != 0
    groups, blocks = W_GBRC.shape[:2]
    largest_GBR = W_GBRC.abs().amax(-1)
    if group:
        even_GBR = torch.nn.functional.pad(largest_GBR, (0, 0, 0, blocks % 2))
        largest_GSR = even_GBR.view(groups, -1, 2, ROWS).amax(2)
        scales = _bf16_up(largest_GSR / 127)
        scale_GBR = scales.float().repeat_interleave(2, 1)[:, :blocks]
    else:
        scales = (largest_GBR.amax(1) / 127).flatten()
        scale_GBR = scales.view(groups, 1, ROWS).expand(-1, blocks, -1)
    # divided, not multiplied by 1/scale, which is infinite for rows of subnormal weights
    q_GBRC = (W_GBRC / scale_GBR.unsqueeze(-1)).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    tensors = _assemble(kept, q_GBRC)
    tensors["scales"] = scales.contiguous()
    tensors["sums"] = _sums(q_GBRC, scales, group)
    return PackedTensor(tensors, shape, "int8", group)


def _bf16_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 ≥ x, so that the largest weight of a span never exceeds 127."""
    down = (x.view(torch.int32) & -65536).view(torch.float32)
    up = ((x.view(torch.int32) + 65535) & -65536).view(torch.float32)
    return torch.where(down == x, down, up).to(torch.bfloat16)


def _sums(q_GBRC: Tensor, scales: Tensor, group: int | None) -> Tensor:
    """What 16-bit activations need to take an offset back: the sum of a row's integers, or of scale x integer."""
    per_block_GBR = q_GBRC.sum(-1, dtype=torch.int64)
    if group is None:
        return per_block_GBR.sum(1).flatten().float()
    scale_GBR = scales.double().repeat_interleave(2, 1)[:, : per_block_GBR.shape[1]]
    return (per_block_GBR * scale_GBR).sum(1).flatten().float()


def _in_place(packed: PackedTensor) -> Tensor:
    """The stored values in their places, [G, B, 4, 64], zero elsewhere."""
    kept = _masks_to_bits(packed.tensors["masks"])
    values = packed.tensors["values"]
    bits = values.view(_INTEGER.get(values.dtype, values.dtype))
    found = bits.new_zeros(kept.shape)
    found[kept] = bits[: packed.nnz]
    return found.view(values.dtype)


def unpack(packed: PackedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight [O, I]: the stored values where they were, +0 elsewhere; int8 values times their scale.

    dtype None gives the stored float kind, and float32 for int8.
    """
    W_GBRC = _in_place(packed)
    if packed.values == "int8":
        scales = packed.tensors["scales"]
        groups, blocks = W_GBRC.shape[:2]
        if packed.group:
            scale_GBR = scales.float().repeat_interleave(2, 1)[:, :blocks]
        else:
            scale_GBR = scales.view(groups, 1, ROWS)
        W_GBRC = W_GBRC * scale_GBR.unsqueeze(-1)
    W_OI = _deinterleave(W_GBRC, packed.shape)
    if packed.values == "int8":
        # A scale that was rounded up may carry the largest weight past what is finite.
        largest = torch.finfo(dtype or torch.float32).max
        W_OI.clamp_(-largest, largest)
    return W_OI if dtype is None else W_OI.to(dtype)


def check(packed: PackedTensor, name: str = "weight") -> None:
    """Refuse, by name, a packed weight whose tensors do not fit together: no kernel may ever read past an array.

    Checks version, dtypes, shapes, the offsets against the population of every mask, that no bit is set in the
    padding, and that the scales are finite. It does not know what the values should be: that is a hash's task.
    """
    from tawny.kernels import native

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{name}: {what}; the packed file is damaged or was written by something else")

    if packed.version != VERSION:
        raise refuse(f"packed format version {packed.version!r}, this Tawny reads {VERSION}")
    _known(packed.values, packed.group)
    offsets = packed.tensors.get("offsets")
    if offsets is None or offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() < 2:
        raise refuse("offsets are not an int64 vector")
    nnz = int(offsets[-1])
    if not 0 <= nnz <= packed.shape[0] * packed.shape[1]:
        raise refuse(f"{nnz} survivors in a weight of shape {packed.shape}")
    wanted = shapes(packed.shape, packed.values, packed.group, nnz)
    if wanted.keys() != packed.tensors.keys():
        raise refuse(f"tensors {sorted(packed.tensors)} where {sorted(wanted)} belong")
    for key, (dtype, size) in wanted.items():
        tensor = packed.tensors[key]
        if tensor.dtype != dtype or tuple(tensor.shape) != size or not tensor.is_contiguous():
            raise refuse(f"{key} is {tensor.dtype} {tuple(tensor.shape)} where {dtype} {size} belongs")
    fault = native.check(packed.tensors["masks"], offsets, packed.shape, nnz)
    if fault:
        raise refuse(fault)
    if packed.values == "int8" and not (
        torch.isfinite(packed.tensors["scales"]).all() and torch.isfinite(packed.tensors["sums"]).all()
    ):
        raise refuse("scales or sums hold NaN or infinity")
