"""The kinds of packed values: one table, read by the format, folders, recovery, the command line, the docs and tests.

A new kind is one row here. Plain torch then packs, opens and multiplies it. One trait in kernels/generic.h and its code
make the compiled kernels read it too. Nothing here imports torch before it computes, because `--help` shows the table.
"""

from __future__ import annotations

__all__ = ["KINDS", "Kind", "kind_of", "names_of", "scaled_kinds"]

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tawny.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def _as_they_are(survivors: Tensor) -> Tensor:
    return survivors


def _slice(values: Tensor, first: int, last: int) -> Tensor:
    return values[first:last]


@dataclass(frozen=True)
class Kind:
    """How survivors are stored.

    Attributes:
        help: one line for a person who chooses.
        bits: of a stored survivor.
        storage: torch's name for the type of the tensor that holds them.
        code: the kind's number in the compiled kernels (tawny.h); None where plain torch alone reads it.
        break_even: sparsity from which a packed product is faster than our dense one in bfloat16.
        exact: types of a checkpoint, as safetensors calls them, of which no bit is lost.
        levels: 0 for floats. Integers run from −levels to levels, and a scale belongs to them.
        groups: how many columns a scale may cover instead of a row.
        encode: survivors, as `storage` or rounded to integers (int8), → what is stored, without padding.
        decode: (what is stored, first, last) → survivors `first` to `last` as floats, or as integers without scale.
    """

    name: str
    help: str
    bits: int
    storage: str
    code: int | None
    break_even: float
    exact: tuple[str, ...] = ()
    levels: int = 0
    groups: tuple[int, ...] = ()
    encode: Callable[[Tensor], Tensor] = _as_they_are
    decode: Callable[[Tensor, int, int], Tensor] = _slice

    @property
    def scaled(self) -> bool:
        """Whether survivors are integers that a scale belongs to."""
        return self.levels > 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tensor that holds the survivors."""
        import torch

        made: torch.dtype = getattr(torch, self.storage)
        return made

    def round(self, W: Tensor, scale: Tensor) -> Tensor:
        """The integers that stand for weights."""
        # Divided, not multiplied by 1/scale, which is infinite for rows of subnormal weights.
        return (W / scale).nan_to_num(0.0).round().clamp(-self.levels, self.levels)

    def rounded(self, W_OI: Tensor) -> Tensor:
        """The weight that comes back after it was packed with a scale a row."""
        scale_O1 = W_OI.abs().amax(1, keepdim=True) / self.levels
        return self.round(W_OI, scale_O1) * scale_O1


# break_even: benchmarks/kernels.py, one token.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("bf16", "the type of most checkpoints", 16, "bfloat16", 1, 0.10, ("BF16",)),
        Kind("f16", "for checkpoints in float16", 16, "float16", 2, 0.10, ("F16",)),
        Kind("f32", "every bit of any checkpoint", 32, "float32", 0, 0.10, ("F32", "BF16", "F16")),
        Kind(
            "int8",
            "half the bytes, with a scale a row or group",
            8,
            "int8",
            3,
            0.0,
            levels=127,
            groups=(128,),
        ),
    )
}


def names_of(kinds: Iterable[Kind], last: str = ", ") -> str:
    """Names for a person: `bf16, f16, f32 or int8`, with the word between the last two given."""
    *first, end = [kind.name for kind in kinds]
    return f"{', '.join(first)}{last}{end}" if first else end


def scaled_kinds() -> list[Kind]:
    """Those whose survivors are rounded to integers."""
    return [kind for kind in KINDS.values() if kind.scaled]


def kind_of(name: str, group: int | None = None) -> Kind:
    """The row called `name`.

    Raises:
        UserError: there is none, or its scales do not cover `group` columns.
    """
    if (kind := KINDS.get(name)) is None:
        raise UserError(f"packed values {name!r} are not known; choose one of {names_of(KINDS.values())}")
    if group is not None and group not in kind.groups:
        others = [other for other in KINDS.values() if group in other.groups]
        if others:
            raise UserError(f"group {group} goes with {names_of(others, ' or ')} values, not with {name}")
        known = sorted({size for other in KINDS.values() for size in other.groups})
        raise UserError(
            f"group {group!r} is not possible; scales cover a row (None) or {', '.join(map(str, known))} columns"
        )
    return kind
