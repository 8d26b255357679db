"""What every reader of a quantised checkpoint builds on: the tensors of the files, and a float tensor made from some of them.

Legend: O rows of a weight, I its columns, G groups of columns that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawny.errors import CheckpointError
from tawny.model.tensorfile import TensorEntry

Parts = Mapping[str, Tensor]
_FLOATS = {"F16", "BF16", "F32", "F64"}
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of E2M1; the fourth bit is the sign


@dataclass(frozen=True)
class Coded:
    """A float tensor as its checkpoint holds it.

    Attributes:
        parts: names of the stored tensors it is made from, by what they are.
        shape: of the float tensor, `[out, in]`, or `[experts, …, …]` where experts are fused.
        form: how it is stored, in words.
        decode: makes one float32 matrix from the parts.
    """

    parts: Mapping[str, str]
    shape: tuple[int, ...]
    form: str
    decode: Callable[[Parts], Tensor]

    def make(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`; of fused experts no more than one matrix at a time is held in float32."""
        if len(self.shape) < 3:
            return self.decode(parts).to(dtype)
        whole = torch.empty(self.shape, dtype=dtype)
        for index in range(self.shape[0]):
            whole[index] = self.decode(
                {role: _of_expert(part, index, len(whole)) for role, part in parts.items()}
            )
        return whole

    @property
    def working(self) -> int:
        """Bytes that `make` takes beside parts and result: a matrix and its scales in float32."""
        return 8 * math.prod(self.shape[-2:])


def _of_expert(part: Tensor, index: int, experts: int) -> Tensor:
    return part[index] if part.dim() > 0 and part.shape[0] == experts else part


@dataclass(frozen=True)
class Stored:
    """The tensors of a quantised checkpoint.

    Attributes:
        entries: dtype and shape of every tensor, by name.
        settings: `quantization_config`.
        read: one tensor.
    """

    folder: Path
    entries: Mapping[str, TensorEntry]
    settings: Mapping[str, Any]
    read: Callable[[str], Tensor]

    def ending(self, suffix: str) -> Iterator[tuple[str, TensorEntry]]:
        """Tensors whose names end so, by what stands before it."""
        for name, entry in self.entries.items():
            if name.endswith(suffix):
                yield name.removesuffix(suffix), entry

    def need(self, name: str, dtypes: Sequence[str], shape: Sequence[int] | None = None) -> TensorEntry:
        """A tensor that must be there, of one of these dtypes and of this shape.

        Raises:
            CheckpointError: names it.
        """
        if name not in self.entries:
            raise self.refused(name, "is missing")
        entry = self.entries[name]
        if entry.dtype not in dtypes:
            raise self.refused(name, f"is stored as {entry.dtype}, not as {' or '.join(dtypes)}")
        if shape is not None and entry.shape != tuple(shape):
            raise self.refused(name, f"has shape {list(entry.shape)}, the tensors beside it {list(shape)}")
        return entry

    def scale(self, name: str, shape: Sequence[int] | None = None) -> TensorEntry:
        """A scale in a float type, as `need` finds it."""
        return self.need(name, sorted(_FLOATS), shape)

    def refused(self, name: str, said: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {name!r} {said}; fetch the checkpoint again")

    def number(self, key: str) -> int:
        """A whole number of the settings."""
        value = self.settings.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.folder}: {key} of quantization_config is {value!r}; expected a whole number"
            )
        return value


Reader = Callable[[Stored], dict[str, Coded]]


def blocks_of(
    shape: Sequence[int], grid: Sequence[int], sizes: Sequence[Sequence[int]]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from the shapes of a matrix and of its scales; None where they do not fit.

    Args:
        sizes: what the configuration names; they decide where the last block of an axis is cut off. Where there are any, the
            others can only have one scale for all, or a row with its own.
    """
    for rows, columns in sizes:
        if (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)) == tuple(grid):
            return rows, columns
    if sizes and tuple(grid) != (1, 1) and grid[0] != shape[0]:
        return None
    if any(count < 1 or length % count for length, count in zip(shape, grid, strict=True)):
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


def scaled(values_OI: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Float32 values times the scale of their block, in place; `scale` is `[O / rows, I / columns]`, the ends rounded up."""
    rows, columns = block
    scale = scale.float()
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(columns, 1)[:, : values_OI.shape[1]]
    if scale.shape[0] in (1, values_OI.shape[0]):
        return values_OI.mul_(scale)
    for index, row in enumerate(scale):
        values_OI[index * rows : (index + 1) * rows].mul_(row)
    return values_OI


def powers_of_two(exponents: Tensor) -> Tensor:
    """E8M0: bytes that stand for 2^(byte - 127). torch's own type of it is the same bytes."""
    return torch.ones(exponents.shape).ldexp(exponents.view(torch.uint8).int() - 127)


def pairs(bytes_ON: Tensor, code: Tensor | None = None, *, high_first: bool = False) -> Tensor:
    """`[O, 2N]` values of the two halves of each byte, by default FP4 (E2M1), the lower half first.

    Args:
        code: the 16 values that stand for 0 … 15.
    """
    if code is None:
        code = torch.tensor([*_FP4, *(-value for value in _FP4)])
    byte = torch.arange(256)
    halves = [byte >> 4, byte & 15] if high_first else [byte & 15, byte >> 4]
    table = torch.stack([code[half] for half in halves], 1)
    return torch.nn.functional.embedding(bytes_ON.view(torch.uint8).int(), table).flatten(-2)


def made_of_bits(words_ON: Tensor, bits: int, count: int) -> Tensor:
    """`[O, count]` numbers (uint8) of so many bits, packed one after the other into the words of each row, lowest bits first."""
    bytes_ON = words_ON.contiguous().view(torch.uint8)
    width = bits if 8 % bits == 0 else 1
    steps = torch.arange(0, 8, width, dtype=torch.uint8)
    parts = bytes_ON.unsqueeze(-1).bitwise_right_shift(steps).bitwise_and_(2**width - 1).flatten(-2)
    if width == bits:
        return parts[:, :count]
    single = parts[:, : count * bits].reshape(len(parts), count, bits)
    return (single << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
