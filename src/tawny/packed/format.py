"""The packed weight: a bit mask plus the surviving values, and nothing else.

A weight W [out, in] is cut into groups of 4 rows. For each 64 columns a group holds four 64-bit masks, one a row, and
the survivors of those four rows one after another; all masks lie in one tensor, all values in another, and one offset
a group says where its values begin. docs/packed-format.md is the specification, precise enough to write a reader from.

What is promised: `unpack(pack(W))` is W bit for bit for the float kinds (after the cast to that kind), −0.0 and NaN
payloads included, because a survivor is a weight with any bit set, not a weight that differs from zero. Integers
carry a float32 scale a row, or a scale for each group of columns of a row: eight bits where nothing is lost by it, else
bfloat16. Every survivor stays a survivor even when it rounds to 0, so the mask of a pruned weight is never lost.
One format serves 0-100 % sparsity and n:m. A weight of integers that is whole has no masks and no offsets: every column is
stored, those of the padding too.

Shapes: O out, I in, G = ceil(O/4) groups, B = ceil(I/64) blocks of columns, S = ceil(64 B / group) spans of a scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tawny.errors import NumericalError, UserError
from tawny.kernels import ops
from tawny.kernels.layout import (
    COLUMNS,
    ROWS,
    Weight,
    bit_pattern,
    bits_to_masks,
    interleave,
    masks_to_bits,
    spread,
)
from tawny.kernels.scales import short
from tawny.kinds import KINDS, Kind, kind_of
from tawny.precision import lost_in
from tawny.solvers.grid import ScaledGrid, largest

VERSION = 4
COINCIDENCE = 1e-3  # share of zeros up to which a grid without 0 may move them
_ON_GRID = 0.5  # share of groups that rounding in 16 bits hides at most; of weights that were not solved it is nearly all
_LIKELY = 16  # tries that find nearly all groups of a weight that was solved for int8
_LOOKED_AT = 1 << 14  # weights that tell whether all were solved on the grid
_PART = 1 << 20  # weights that are packed at once
_Try = tuple[
    bool, int, int
]  # a long scale or one of few bits, which neighbour, and the level of the largest weight
PADDING = 64  # bytes after the last value, because kernels load whole vectors


@dataclass(frozen=True)
class PackedForm:
    """What the types and shapes of a packed weight's tensors follow from.

    Attributes:
        shape: `[out, in]` of the weight.
        nnz: survivors.
        whole: nothing was removed, and there are no masks.
        short: scales are codes (kernels/scales.py).
    """

    shape: tuple[int, int]
    values: str
    group: int | None
    nnz: int
    whole: bool = False
    short: bool = False

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor, by name."""
        kind = kind_of(self.values, self.group)
        group = kind.span(self.group)
        out, columns = self.shape
        groups, blocks = -(-out // ROWS), -(-columns // COLUMNS)
        stored = kind.stored(groups * blocks * ROWS * COLUMNS if self.whole else self.nnz)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if not self.whole:
            tensors["masks"] = (torch.int64, (groups, blocks, ROWS))
            tensors["offsets"] = (torch.int64, (groups + 1,))
        tensors["values"] = (kind.dtype, (stored + PADDING // kind.dtype.itemsize,))
        if kind.scaled:
            rows = (groups * ROWS,)
            tensors["scales"] = torch.float32, rows
            if group:
                dtype = torch.uint8 if self.short else torch.bfloat16
                tensors["scales"] = dtype, (groups, -(-blocks * COLUMNS // group), ROWS)
            if self.short:
                tensors["exponents"] = torch.uint8, rows
            tensors["sums"] = (torch.float32, rows)
        return tensors


@dataclass(frozen=True)
class PackedTensor:
    """One packed weight: its tensors by name and what is needed to read them.

    tensors: `values` [what the kind stores of nnz survivors + padding]; `masks` int64 [G, B, 4] and `offsets` int64
    [G + 1], unless it is whole; with integers also `scales` (float32 [4G], or bfloat16 [G, S, 4] with a group) and
    `sums` float32 [4G]. With `exponents` uint8 [4G] scales are codes, uint8.
    """

    tensors: dict[str, Tensor]
    shape: tuple[int, int]
    values: str
    group: int | None = None

    @property
    def whole(self) -> bool:
        return "masks" not in self.tensors

    @property
    def nnz(self) -> int:
        return self.shape[0] * self.shape[1] if self.whole else int(self.tensors["offsets"][-1])

    @property
    def form(self) -> PackedForm:
        return PackedForm(
            self.shape, self.values, self.group, self.nnz, self.whole, "exponents" in self.tensors
        )

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def weight(self) -> Weight:
        """As kernels take it."""
        t = self.tensors
        return Weight(
            t.get("masks"),
            t["values"],
            t.get("offsets"),
            t.get("scales"),
            t.get("exponents"),
            t.get("sums"),
            *self.shape,
            KINDS[self.values],
            self.group or 0,
        )


def cheaper_whole(density: float, kind: Kind) -> bool:
    """True where storing the zeros as values takes fewer bytes than a mask that says where they are.

    A grid without zero moves them by half a step. One in a thousand is a coincidence; more are a mask, and are kept.
    """
    least = COINCIDENCE if kind.scaled and 0 not in kind.grid else 1 / kind.bits
    return 1 - density < least


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


def of_another(version: object) -> str:
    """How a version of the format that is not `VERSION` is refused."""
    return f"packed format version {version!r}, this Tawny reads version {VERSION}; pack the model again, or use a newer Tawny"


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
    W_OI: Tensor,
    values: str = "bf16",
    group: int | None = None,
    whole: bool = False,
) -> PackedTensor:
    """Pack a dense weight with zeros. The weight is first cast to `values`; what is then all zero bits is dropped.

    Args:
        whole: drop nothing: for weights with hardly any zeros. Integers then do without masks, floats in their file.

    Raises:
        NumericalError: a finite weight is too large for `values`, or one that should become an integer is not finite.
    """
    kind = kind_of(values, group)
    group = kind.span(group)
    if W_OI.dim() != 2 or 0 in W_OI.shape:
        raise UserError(f"a packed weight is a matrix with at least one weight, not {tuple(W_OI.shape)}")
    check_dtype(W_OI)
    W_OI = W_OI.detach().cpu()
    shape = (W_OI.shape[0], W_OI.shape[1])
    if kind.scaled and not torch.isfinite(W_OI).all():
        raise NumericalError(f"a weight of shape {shape} holds NaN or infinity and cannot become {kind.name}")
    scales_OS = scales_of(W_OI, kind, group, whole) if kind.scaled else None
    step = ROWS * max(1, _PART // (ROWS * shape[1]))
    parts = [
        _rows(
            W_OI[top : top + step],
            kind,
            group,
            whole,
            None if scales_OS is None else scales_OS[top : top + step],
        )
        for top in range(0, shape[0], step)
    ]
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if "counts" in tensors:
        counts = tensors.pop("counts")
        tensors["offsets"] = counts.new_zeros(counts.numel() + 1)
        torch.cumsum(counts, 0, out=tensors["offsets"][1:])
    if kind.scaled and group and (coded := short(tensors["scales"])) is not None:
        tensors |= dict(zip(("scales", "exponents"), coded, strict=True))
    survivors = tensors.pop("values")
    stored = kind.encode(survivors if kind.scaled else survivors.view(kind.dtype))
    padding = stored.new_zeros(PADDING // stored.element_size())
    tensors["values"] = torch.cat([bit_pattern(stored), bit_pattern(padding)]).view(stored.dtype)
    return PackedTensor(tensors, shape, values, group)


def _rows(
    W_OI: Tensor, kind: Kind, group: int | None, whole: bool, scales_OS: Tensor | None
) -> dict[str, Tensor]:
    """Some rows of a weight: survivors as bits or integers, `counts` of them, `masks`, and what belongs to scales.

    A head has hundreds of millions of weights, and this takes many bytes for each.
    """
    bits_GBRC = interleave(bit_pattern(_cast(W_OI, kind)))
    # −0.0 was a survivor of pruning: its place stays in the mask.
    kept_GBRC = masks_to_bits(full_masks((len(W_OI), W_OI.shape[1]))) if whole else bits_GBRC != 0
    tensors: dict[str, Tensor] = {}
    if scales_OS is not None:
        removing = None if whole else kept_GBRC
        bits_GBRC, tensors = _scale(bits_GBRC.view(torch.float32), kind, group, scales_OS, removing)
        if whole:
            return {**tensors, "values": bits_GBRC.flatten()}
    counts, masks = kept_GBRC.flatten(1).sum(1), bits_to_masks(kept_GBRC)
    return {**tensors, "masks": masks, "counts": counts, "values": bits_GBRC.flatten()[kept_GBRC.flatten()]}


def _cast(W_OI: Tensor, kind: Kind) -> Tensor:
    """The weight as the floats that are stored, or that are about to be rounded to integers.

    Infinity that was there before is the checkpoint's own and is kept bit for bit; more of it is a loss.
    """
    shape = tuple(W_OI.shape)
    dtype, name = (torch.float32, "f32") if kind.scaled else (kind.dtype, kind.name)
    cast_OI = W_OI.to(dtype)
    if (lost := lost_in(W_OI, cast_OI)) is not None:
        raise NumericalError(
            f"a weight of shape {shape} holds {lost:.4g}, which is infinity in {name}; "
            "pack it with values that hold it (f32, or bf16 for weights in bfloat16)"
        )
    return cast_OI


def scales_of(stored_OI: Tensor, kind: Kind, group: int | None, whole: bool = False) -> Tensor:
    """float32 [O, 1 or ceil(I / group)], values that bfloat16 holds where there is a group: the best scales.

    Each scale is tried first that makes the largest weight of the group a level: the least-squares scale for the nearest
    levels, and its neighbours. One that gives every weight back bit for bit is taken. A checkpoint in 16 bits stored
    scale × level rounded, and so a weight that was solved on the grid comes back as it is. Eight packed bits of
    other weights follow the largest one.
    """
    grid = ScaledGrid(kind.grid, group, long=kind.target != "packed")
    rows, stored_GC = len(stored_OI), grid.split(stored_OI).flatten(0, 1)
    groups, width = stored_GC.shape
    device = stored_OI.device
    real_SC = grid.split(torch.ones(1, stored_OI.shape[1], dtype=torch.bool, device=device))[0]

    def again(index_G: Tensor, tries: Sequence[_Try]) -> Tensor:
        some_GC = stored_GC[index_G]
        W_GC = some_GC.float()
        keep_GC = real_SC[index_G % len(real_SC)] if whole else W_GC != 0
        return _scales_again(W_GC, some_GC, keep_GC, grid, kind, tries)

    found_G = torch.full((groups,), torch.nan, device=device)
    some_G = torch.arange(0, groups, max(1, groups // max(8, _LOOKED_AT // width)), device=device)
    tries = _tries(kind)
    likely = tries[:_LIKELY] if kind.bits == 8 else tries
    if float(again(some_G, likely).isnan().float().mean()) <= _ON_GRID:
        size = max(1, _PART // width)
        every_G = torch.arange(groups, device=device)
        parts = [every_G[top : top + size] for top in range(0, groups, size)]
        found_G = torch.cat([again(part, tries) for part in parts])
    found_OS = found_G.view(rows, -1)
    if not bool(found_G.isnan().any()):
        return found_OS
    if kind.bits == 8 and kind.target == "packed":
        largest_OS = stored_GC.abs().amax(1).view(rows, -1).float() / kind.largest
        usual_OS = largest_OS if group is None else _bf16_up(largest_OS).float()
    else:
        W_OI = stored_OI.float()
        keep_OI = torch.ones_like(W_OI, dtype=torch.bool) if whole else W_OI != 0
        usual_OS = grid.suiting(W_OI).fit(W_OI, None, keep_OI)
    return torch.where(found_OS.isnan(), usual_OS, found_OS)


def _tries(kind: Kind) -> list[_Try]:
    """What a scale may be like, the likeliest first.

    Where several would do, one of few bits is taken: a single one of more would make all scales of the weight long. Those of
    eight-bit values are long, and the largest weight is not far from their last level.
    """
    if kind.bits == 8:
        # A group of low levels has those of twice the height, too, at half the scale: up to half of the largest level, which
        # counts, as the only level of that size may be negative. The sign of the scale is free: one of two opposite ones will do.
        ends = [level for level in kind.grid if 2 * abs(level) >= kind.largest]
        levels = sorted((x for x in ends if x > 0 or -x not in kind.grid), key=abs, reverse=True)
        return [(True, neighbour, level) for neighbour in (0, -1, 1) for level in levels]
    levels = sorted(filter(None, kind.grid), key=abs, reverse=True)
    forms = [(False, 0), (True, 0), (True, -1), (True, 1)]  # few bits lie too far apart for a neighbour
    return [(*form, level) for form in forms[kind.long :] for level in levels]


def _scales_again(
    W_GC: Tensor, stored_GC: Tensor, keep_GC: Tensor, grid: ScaledGrid, kind: Kind, tries: Sequence[_Try]
) -> Tensor:
    """[G]: for each group of columns the first scale that gives every weight back as it is stored; NaN where none does."""
    found_G, left_G = W_GC.new_full((len(W_GC),), torch.nan), torch.arange(len(W_GC), device=W_GC.device)
    for long, neighbour, level in tries:
        if not len(left_G):
            break
        grid = replace(grid, long=long)
        made_GC, tried_G1 = grid.refit(W_GC, largest(W_GC, grid) / level, None, keep_GC)
        if neighbour or kind.bits == 8:  # the first guess is too rough for the highest of so many levels
            tried_G1 = (tried_G1.view(torch.int32) + (neighbour << grid.lost)).view(torch.float32)
            made_GC = grid.project(W_GC, tried_G1.nan_to_num_(0.0), keep_GC)
        same_G = (made_GC.to(stored_GC.dtype) == stored_GC).all(1)
        same_G &= (tried_G1[:, 0] * kind.largest).isfinite()  # sums near the end of float32 fit anything
        found_G[left_G[same_G]] = tried_G1[same_G, 0]
        left_G = left_G[~same_G]
        W_GC, stored_GC, keep_GC = W_GC[~same_G], stored_GC[~same_G], keep_GC[~same_G]
    return found_G


def _scale(
    W_GBRC: Tensor, kind: Kind, group: int | None, scales_OS: Tensor, kept_GBRC: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight as integers, and its `scales` and `sums`."""
    groups, blocks = W_GBRC.shape[:2]
    rows = torch.nn.functional.pad(scales_OS, (0, 0, 0, groups * ROWS - len(scales_OS)))
    if group:
        spans = -(-blocks * COLUMNS // group)
        rows = torch.nn.functional.pad(rows, (0, spans - rows.shape[1]))
        scales = rows.view(groups, ROWS, spans).transpose(1, 2).to(torch.bfloat16).contiguous()
        scale_GBRC = spread(scales, blocks)
    else:
        scales = rows.flatten()
        scale_GBRC = rows.view(groups, 1, ROWS, 1)
    q_GBRC = kind.round(W_GBRC, scale_GBRC).to(torch.int8)
    if kept_GBRC is not None and kind.grid.count(0) == 0:
        q_GBRC *= kept_GBRC  # a grid without zero would give what was removed a value
    # What 16-bit activations need to take an offset back: the sum of a row's integers, or of scale x integer.
    sums_GBR = (q_GBRC * scale_GBRC.double()).sum(-1) if group else q_GBRC.sum(-1, dtype=torch.int64)
    return q_GBRC, {"scales": scales, "sums": sums_GBR.sum(1).flatten().float()}


def _bf16_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 ≥ x, so that the largest weight of a span never passes the largest integer."""
    down = (x.view(torch.int32) & -65536).view(torch.float32)
    up = ((x.view(torch.int32) + 65535) & -65536).view(torch.float32)
    return torch.where(down == x, down, up).to(torch.bfloat16)


def unpack(packed: PackedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight [O, I]: the stored values where they were, +0 elsewhere; integers times their scale.

    dtype None gives the stored float kind, and float32 for integers.
    """
    kind = packed.weight.kind
    return ops.expand(packed.weight, dtype or (torch.float32 if kind.scaled else kind.dtype))


def whole(packed: PackedTensor) -> PackedTensor:
    """The same integers as int8 without a mask, zeros in their places, under the same scales.

    Raises:
        UserError: the weight holds floats, which have no scale that could be kept.
    """
    t = packed.tensors
    if "scales" not in t:
        raise UserError(f"{packed.values} values have no scales; only integers become whole int8")
    # The weight whose scales are 1 is the integers, and bfloat16 holds them exactly.
    ones = torch.ones_like(t["scales"], dtype=torch.bfloat16 if packed.group else torch.float32)
    kept = {key: tensor for key, tensor in t.items() if key != "exponents"}
    integers = replace(packed, tensors=kept | {"scales": ones})
    q_OI = ops.expand(integers.weight, torch.bfloat16).to(torch.int8)
    padding = t["values"].new_zeros(PADDING, dtype=torch.int8)
    values = torch.cat([interleave(q_OI).flatten(), padding])
    tensors = {key: tensor for key, tensor in t.items() if key in ("scales", "exponents", "sums")}
    return PackedTensor(tensors | {"values": values}, packed.shape, "int8", packed.group)
