"""The kinds of packed values: one table, read by kernels, recipes, the format, recovery, the command line, docs and tests.

A new kind is one row here. Plain torch then packs, opens and multiplies it. For the compiled kernels it needs a number in
kernels/tawny.h, and a trait and a case of `with_kind` in kernels/generic.h; that raises `ABI` in kernels/native.py and
`tawny_abi` in kernels/dispatch.cpp. Its row also stands in docs/packed-format.md. Types of GGUF files are in gguf_kinds.py, and
kinds for GPUs in `GPU_KINDS` below. Nothing here imports torch before it computes, because `--help` shows the table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tawny.errors import UserError
from tawny.gguf_kinds import GGUF_KINDS, GGUFKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK = 64  # codes that are stored together
_ENCODED = CHUNK << 14  # that are made at once: each takes many bytes on the way
_PLANES = (4, 2, 1)  # bits of a code that lie together


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
        grid: the integers that a survivor is rounded to, ascending; a scale belongs to them. Empty for floats.
        groups: how many columns a scale may cover, None for the whole row; the first is the usual one.
        error: of a linear's output by plain rounding, as a multiple of what int3 loses (docs/log/fit.md, q_proj). A kind with a grid
            has one: `tawny plan fit` goes by it.
    """

    name: str
    help: str
    bits: int
    storage: str
    code: int | None
    break_even: float
    exact: tuple[str, ...] = ()
    grid: tuple[int, ...] = ()
    groups: tuple[int | None, ...] = (None,)
    error: float = 0.0

    def __post_init__(self) -> None:
        if self.scaled and not self.error:
            raise ValueError(f"kind {self.name} rounds to a grid: its row needs the `error` that this makes")

    @property
    def scaled(self) -> bool:
        """Whether survivors are integers that a scale belongs to."""
        return bool(self.grid)

    @property
    def target(self) -> str:
        """What holds it, as `tawny fit --to` calls that."""
        return "compressed-tensors" if self.storage == "int32" else "packed"

    @property
    def long(self) -> bool:
        """Whether scales have the eight significant bits of bfloat16, whatever they cover."""
        return self.bits == 8 or self.storage == "int32"

    @property
    def learns(self) -> bool:
        """Whether training learns its scales, too. Those of int8 follow the largest weight, and are not found again in a group."""
        return self.scaled and (self.bits < 8 or self.target != "packed")

    @property
    def zero(self) -> bool:
        """Whether a weight of 0 stays 0: a mask says so."""
        return True

    @property
    def largest(self) -> int:
        """The largest magnitude of the grid."""
        return max(-self.grid[0], self.grid[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The type of the tensor that holds the survivors."""
        import torch

        made: torch.dtype = getattr(torch, self.storage)
        return made

    def span(self, group: int | None) -> int | None:
        """The columns of a scale: those that were asked for, or the usual ones."""
        return self.groups[0] if group is None else group

    def columns(self, width: int, group: int | None) -> int:
        """The columns of a scale in a weight so wide; 0 where other runtimes' groups do not divide it."""
        return (self.span(group) or width) if self.target == "packed" else dividing(width, group)

    def stored(self, count: int) -> int:
        """Elements of `storage` that so many survivors take, without padding."""
        return -(-count // CHUNK) * 8 * self.bits if self.storage == "uint8" else count

    def encode(self, survivors: Tensor) -> Tensor:
        """What is stored of survivors: `storage`, or integers of the grid (int8)."""
        if self.storage != "uint8":
            return survivors
        import torch

        if len(survivors) > _ENCODED:
            tops = range(0, len(survivors), _ENCODED)
            return torch.cat([self.encode(survivors[top : top + _ENCODED]) for top in tops])
        padded = torch.nn.functional.pad(survivors, (0, -len(survivors) % CHUNK), value=self.grid[0])
        code_of = torch.zeros(self.grid[-1] - self.grid[0] + 1, dtype=torch.uint8)
        code_of[torch.tensor(self.grid) - self.grid[0]] = torch.arange(len(self.grid), dtype=torch.uint8)
        codes = code_of.index_select(0, padded.int() - self.grid[0])
        left, planes = codes.view(-1, CHUNK), []
        for width in self._planes():
            part = left & (1 << width) - 1
            left = left >> width
            # Field k of byte j is code j + k · bytes: what a vector of bytes unpacks with one shift a field.
            part = part.view(-1, 8 // width, 8 * width)
            shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(1, -1, 1)
            planes.append((part << shifts).sum(1, dtype=torch.uint8))
        return torch.cat(planes, 1).flatten()

    def decode(self, values: Tensor, first: int, last: int) -> Tensor:
        """Survivors `first` to `last` of what is stored: floats, or integers of the grid without their scale (int8)."""
        if self.storage != "uint8":
            return values[first:last]
        import torch

        size = 8 * self.bits
        begin, end = first // CHUNK, -(-last // CHUNK)
        chunks = values[begin * size : end * size].view(-1, size)
        codes, shift, at = chunks.new_zeros(len(chunks), CHUNK), 0, 0
        for width in self._planes():
            plane = chunks[:, at : at + 8 * width].unsqueeze(1)
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=values.device).view(1, -1, 1)
            codes |= ((plane >> shifts) & (1 << width) - 1).flatten(1) << shift
            at, shift = at + 8 * width, shift + width
        table = torch.tensor(self.grid, dtype=torch.int8, device=values.device)
        return table[codes.flatten()[first - begin * CHUNK : last - begin * CHUNK].int()]

    def _planes(self) -> list[int]:
        return [width for width in _PLANES if self.bits & width]

    def round(self, W: Tensor, scale: Tensor) -> Tensor:
        """The integers of the grid that stand for weights."""
        import torch

        # Divided, not multiplied by 1/scale, which is infinite for rows of subnormal weights.
        ratio = (W / scale).nan_to_num(0.0)
        if len(self.grid) == self.grid[-1] - self.grid[0] + 1:
            return ratio.round_().clamp_(self.grid[0], self.grid[-1])
        nearest = half_steps(self.grid).to(ratio)
        places = ratio.mul_(2).ceil_().sub_(2 * self.grid[0] + 1).clamp_(0, len(nearest) - 1)
        return torch.take(nearest, places.to(torch.int64))

    def rounded(self, W_OI: Tensor) -> Tensor:
        """The weight that comes back after it was packed with a scale a row."""
        scale_O1 = W_OI.abs().amax(1, keepdim=True) / self.largest
        return self.round(W_OI, scale_O1) * scale_O1


@functools.cache
def half_steps(levels: tuple[int, ...]) -> Tensor:
    """The level nearest to what lies in each half of a unit, from the first level on, float32.

    Levels are integers, so the middles between them are halves, and no half of a unit has a middle inside it.
    """
    import torch

    table = torch.tensor(levels, dtype=torch.float32)
    inside = torch.arange(2 * levels[0], 2 * levels[-1] + 1) / 2 + 0.25
    return table[torch.bucketize(inside, (table[1:] + table[:-1]) / 2)]


def _few(name: str, help: str, code: int, grid: Iterable[int], error: float) -> Kind:
    grid = tuple(grid)
    bits = (len(grid) - 1).bit_length()
    return Kind(name, help, bits, "uint8", code, 0.0, grid=grid, groups=(32, 64, 128), error=error)


# The grids of few bits lose least of a linear, dense and pruned, with a scale that may be negative (docs/log/few-bits.md). They
# hold 0, because some linears have groups in which one weight is hundreds of times as large as the others.
_INT4 = (-53, -40, -31, -24, -18, -12, -6, 0, 5, 11, 17, 24, 31, 39, 49, 63)
_INT3 = (-48, -29, -15, 0, 12, 24, 39, 63)
_INT2 = (-50, -15, 24, 63)

# break_even: benchmarks/kernel_speed.py, one token.
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
            grid=tuple(range(-127, 128)),
            groups=(None, 32, 64, 128),
            error=0.006,
        ),
        _few("int6", "three eighths of the bytes", 6, range(-28, 36), 0.024),
        _few("int5", "a third of the bytes", 7, range(-14, 18), 0.095),
        _few("int4", "a quarter of the bytes; best when solved (`tawny prune --values`)", 4, _INT4, 0.24),
        _few("int3", "a fifth of the bytes; only when solved", 5, _INT3, 1.0),
        _few("int2", "a seventh of the bytes; only when solved, with zeros", 8, _INT2, 4.85),
    )
}

# Grids of compressed-tensors: integers in words of 32 bits, for runtimes on GPUs and not for our kernels.
_GPU_GROUPS = (128, 64, 32)  # columns of a scale, the usual ones first; −1 is a row
GPU_KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(name, help, bits, "int32", None, 0.0, grid=levels, groups=(*_GPU_GROUPS, -1), error=error)
        for name, help, bits, levels, error in (
            ("w8", "eight bits for GPUs; nearly nothing is lost", 8, tuple(range(-128, 128)), 0.006),
            ("w4", "four bits for GPUs; best when solved", 4, tuple(range(-8, 8)), 0.35),
        )
    )
}


def dividing(width: int, group: int | None) -> int:
    """Columns of a scale in a weight of `GPU_KINDS`: those asked for, or the most that are usual; 0 where none divides the width."""
    sizes = _GPU_GROUPS if group is None else (width if group == -1 else group,)
    return next((size for size in sizes if width % size == 0), 0)


Solved = Kind | GGUFKind  # what weights are solved for: in a packed folder, in a GGUF file, or for GPUs


def names_of(kinds: Iterable[Solved], last: str = ", ") -> str:
    """Names for a person: `bf16, f16, f32 or int8`, with the word between the last two given."""
    *first, end = [kind.name for kind in kinds]
    return f"{', '.join(first)}{last}{end}" if first else end


def range_of(names: Iterable[str]) -> str:
    """`int4`, or `int3 to int8` where there are several.

    Raises:
        UserError: no kind has the name.
    """
    kinds = sorted({solved_kind(name) for name in names}, key=lambda kind: (kind.bits, kind.name))
    return names_of(kinds if len(kinds) == 1 else (kinds[0], kinds[-1]), " to ")


def scaled_kinds() -> list[Kind]:
    """Those whose survivors are rounded to integers."""
    return [kind for kind in KINDS.values() if kind.scaled]


def solved_kinds() -> list[Solved]:
    """Those that weights are solved for: our integers, the types of GGUF files, and those for GPUs."""
    return [*scaled_kinds(), *GGUF_KINDS.values(), *GPU_KINDS.values()]


def solved_kind(name: str, group: int | None = None) -> Solved:
    """The row called `name`, packed or of another target; raises as `kind_of` does."""
    if name in GPU_KINDS:
        if group is not None and group not in GPU_KINDS[name].groups:
            raise UserError(
                f"group {group} is not possible; scales of {name} cover 32, 64 or 128 columns, or a row (-1)"
            )
        return GPU_KINDS[name]
    kind = GGUF_KINDS.get(name)
    if kind is None:
        return kind_of(name, group)
    if group is not None:
        raise UserError(
            f"group {group} goes with int8 to int2 values; the scales of {name} cover {kind.group} columns"
        )
    return kind


def trained_kind(name: str, group: int | None = None) -> Kind:
    """The row called `name` of integers that weights are trained through: ours, or of those for GPUs; raises as `kind_of` does."""
    made = solved_kind(name, group) if name in GPU_KINDS else kind_of(name, group)
    assert isinstance(made, Kind)
    return made


def kind_of(name: str, group: int | None = None) -> Kind:
    """The row called `name`; a group of None is the kind's usual one.

    Raises:
        UserError: there is none, or its scales do not cover `group` columns.
    """
    if (kind := KINDS.get(name)) is None:
        if name in GPU_KINDS:
            raise UserError(
                f"{name} is a kind for GPUs, which no packed folder holds: `tawny export --to compressed-tensors` writes it"
            )
        if name in GGUF_KINDS:
            raise UserError(
                f"{name} is a type of GGUF files, which no packed folder holds: `tawny export --to gguf` writes it"
            )
        raise UserError(f"packed values {name!r} are not known; choose one of {names_of(KINDS.values())}")
    if group is not None and group not in kind.groups:
        sizes = [str(size) for size in kind.groups if size]
        if not sizes:
            others = names_of([other for other in KINDS.values() if len(other.groups) > 1], " or ")
            raise UserError(f"group {group} goes with {others} values, not with {name}")
        row = "a row (None) or " if None in kind.groups else ""
        raise UserError(
            f"group {group!r} is not possible; scales of {name} cover {row}{', '.join(sizes)} columns"
        )
    return kind
