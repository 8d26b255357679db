"""The block types of GGUF files that weights are solved for: one table, read by recipes, grids, `fit` and `export`.

A row of a weight is cut into blocks, a block into groups of columns. A weight is

    (d · s) · level − (dmin · m)

with d and dmin in float16 for each block, and integers s and m for each group. Types without s have s = 1; types without a
minimum have m = 0. The layouts are those of llama.cpp; the `gguf` package reads what `encode` writes.

A new type is one row of `_ROWS`, and one of `_SCALES` if it packs integers s and m.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GGUFKind:
    """One type.

    Attributes:
        type: GGUF's name for it.
        help: one line for a person who chooses.
        block, group: columns of a block and of a group; the width of a weight is a multiple of `block`.
        levels: ascending; their places are the codes.
        parts: of a block, in the file's order: `d`, `dmin` (float16), `scales`, or `first:count:width`: bits of the codes,
            those of `width` neighbours in as many bytes.
        scales: the smallest and largest s; None where there is none.
        minima: the largest m; 0 where there is none, and 1 where dmin is the minimum.
        error: as that of a `Kind`.
        narrow: the type of a width that is no multiple of `block`.
    """

    name: str
    type: str
    help: str
    block: int
    group: int
    levels: tuple[int, ...]
    parts: tuple[str, ...]
    error: float
    scales: tuple[int, int] | None = None
    minima: int = 0
    narrow: str = ""

    scaled: ClassVar[bool] = True
    target: ClassVar[str] = "gguf"
    groups: ClassVar[tuple[int | None, ...]] = (None,)

    def span(self, group: int | None) -> int | None:
        """As that of a `Kind`: the columns of a group are no choice."""
        return None

    @property
    def bytes(self) -> int:
        """Of a block."""
        return sum(self._size(part) for part in self.parts)

    @property
    def bits(self) -> float:
        """Of a weight, scales included."""
        return 8 * self.bytes / self.block

    @property
    def zero(self) -> bool:
        """Whether a weight of 0 stays 0."""
        return not self.minima and 0 in self.levels

    def _size(self, part: str) -> int:
        if part in ("d", "dmin"):
            return 2
        if part == "scales":
            return _SCALES[self.name][0]
        return int(part.split(":")[1]) * self.block // 8

    def encode(self, codes_OI: Tensor, state_OS: Tensor) -> Tensor:
        """uint8 `[out, bytes of a row]`: what a file holds.

        Args:
            codes_OI: uint8, places in `levels`.
            state_OS: float32 `[out, groups, 4]`: d, s, dmin and m of each group.
        """
        import torch

        codes, n = codes_OI.reshape(-1, self.block), self.block // self.group
        state = state_OS.reshape(-1, n, 4)

        def half(which: int) -> Tensor:
            return state[:, 0, which].to(torch.float16).view(torch.uint8).view(-1, 2)

        made = []
        for part in self.parts:
            if part == "d":
                made.append(half(0))
            elif part == "dmin":
                # A type whose dmin is the minimum adds it.
                made.append(
                    half(2) if self.scales else (-state[:, 0, 2]).half().view(torch.uint8).view(-1, 2)
                )
            elif part == "scales":
                made.append(_SCALES[self.name][1](state[..., 1].int(), state[..., 3].int()).to(torch.uint8))
            else:
                first, count, columns = map(int, part.split(":"))
                made.append(_fields(codes >> first & (1 << count) - 1, count, columns))
        if self.name == "q8_0":
            made[-1] = made[-1] - 127  # a signed byte, whose −128 not every kernel multiplies
        return torch.cat(made, 1).view(len(codes_OI), -1)


def _fields(codes: Tensor, count: int, columns: int) -> Tensor:
    """Bytes of fields of `count` bits: field k of byte j is code j + k · columns of each run of codes."""
    import torch

    fields = 8 // count
    shifts = torch.arange(0, 8, count, dtype=torch.uint8)[:fields].view(1, 1, -1, 1)
    return (codes.view(len(codes), -1, fields, columns) << shifts).sum(2, dtype=torch.uint8).flatten(1)


def _nibbles(s: Tensor, m: Tensor) -> Tensor:
    """Of Q2_K: 4 bits of s and of m in a byte."""
    return s | m << 4


def _six_and_six(s: Tensor, m: Tensor) -> Tensor:
    """Of Q4_K and Q5_K: 6 bits of s and of m of eight groups in twelve bytes."""
    import torch

    low = [each[:, :4] | each[:, 4:] >> 4 << 6 for each in (s, m)]
    return torch.cat([*low, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], 1)


def _six(s: Tensor, m: Tensor) -> Tensor:
    """Of Q3_K: 6 bits of s + 32 of sixteen groups in twelve bytes."""
    import torch

    s = s + 32
    high = (s >> 4).view(-1, 4, 4) << torch.tensor([0, 2, 4, 6]).view(1, 4, 1)
    return torch.cat([s[:, :8] & 15 | (s[:, 8:] & 15) << 4, high.sum(1)], 1)


def _six_apart(s: Tensor, m: Tensor) -> Tensor:
    """Of IQ4_XS: the high bits of s + 32 of eight groups in two bytes, then the low ones in four."""
    import torch

    s = s + 32
    high = ((s >> 4).view(-1, 2, 4) << torch.tensor([0, 2, 4, 6])).sum(2)
    return torch.cat([high, s[:, ::2] & 15 | (s[:, 1::2] & 15) << 4], 1)


def _bytes(s: Tensor, m: Tensor) -> Tensor:
    """Of Q6_K: s as signed bytes."""
    return s & 255


_SCALES: dict[str, tuple[int, Any]] = {
    "q2_k": (16, _nibbles),
    "q3_k": (12, _six),
    "q4_k": (12, _six_and_six),
    "q5_k": (12, _six_and_six),
    "q6_k": (16, _bytes),
    "iq4_xs": (6, _six_apart),
}
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _kind(
    type: str,
    help: str,
    columns: tuple[int, int],
    levels: Iterable[int],
    parts: str,
    error: float,
    **more: Any,
) -> GGUFKind:
    places = tuple(parts.split())
    return GGUFKind(type.lower(), type, help, *columns, tuple(levels), places, error, **more)


# The file of a folder that holds what was solved for GGUF: safetensors of `LINEAR.KIND`.
ENCODED = "gguf.blocks"
_K, _SMALL, _FINE = (256, 32), (32, 32), (256, 16)
_ROWS = (
    _kind("Q8_0", "nearly nothing is lost", _SMALL, range(-127, 128), "d 0:8:32", 0.006),
    _kind(
        "Q6_K", "little is lost", _FINE, range(-32, 32), "0:4:64 4:2:32 scales d", 0.02,
        scales=(-128, 127), narrow="q8_0",
    ),
    _kind("Q5_1", "as Q5_0, with a minimum", _SMALL, range(32), "d dmin 4:1:1 0:4:16", 0.08, minima=1),
    _kind(
        "Q5_K", "five bits", _K, range(32), "d dmin scales 4:1:32 0:4:32", 0.08,
        scales=(0, 63), minima=63, narrow="q5_1",
    ),
    _kind("Q5_0", "five bits, of any width", _SMALL, range(-16, 16), "d 4:1:1 0:4:16", 0.1),
    _kind("Q4_1", "as Q4_0, with a minimum", _SMALL, range(16), "d dmin 0:4:16", 0.3, minima=1),
    _kind(
        "Q4_K", "four bits", _K, range(16), "d dmin scales 0:4:32", 0.3,
        scales=(0, 63), minima=63, narrow="q5_0",
    ),
    _kind("IQ4_NL", "four bits with unequal steps, of any width", _SMALL, _NONLINEAR, "d 0:4:16", 0.25),
    _kind("Q4_0", "four bits, the quickest on many machines", _SMALL, range(-8, 8), "d 0:4:16", 0.35),
    _kind(
        "IQ4_XS", "as IQ4_NL, smaller", _K, _NONLINEAR, "d scales 0:4:16", 0.27,
        scales=(-32, 31), narrow="iq4_nl",
    ),
    _kind(
        "Q3_K", "three bits", _FINE, range(-4, 4), "2:1:32 0:2:32 scales d", 1.2,
        scales=(-32, 31), narrow="iq4_nl",
    ),
    _kind(
        "Q2_K", "two bits", _FINE, range(4), "scales 0:2:32 d dmin", 4.0,
        scales=(0, 15), minima=15, narrow="iq4_nl",
    ),
)  # fmt: skip
GGUF_KINDS: dict[str, GGUFKind] = {kind.name: kind for kind in _ROWS}


def fitting(name: str, width: int) -> str:
    """The type that a weight of this width gets where `name` is asked for; "" where no type takes it."""
    kind: GGUFKind | None = GGUF_KINDS[name]
    while kind is not None and width % kind.block:
        kind = GGUF_KINDS.get(kind.narrow)
    return kind.name if kind else ""
