"""`make test-arm`: the kernels of 64-bit ARM, cross-compiled and run under qemu, against plain torch.

A developer's tool: where the cross compiler or qemu is missing it says so and is content. arm.cpp reads the cases.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tawny.kernels.layout import bit_pattern
from tawny.kernels.ops import FLOATS
from tawny.kinds import KINDS as TABLE
from tawny.packed.format import PackedTensor, pack, unpack
from tests.kernels.test_admm import problem, spread, support
from tests.kernels.test_kernels import ROUNDING, activations
from tests.packed.cases import EVERY, uneven, weight

ROOT = Path(__file__).parents[2]
SHAPES = [(1, 1), (3, 5), (4, 64), (5, 65), (17, 130), (7, 200), (9, 1537), (6, 4200)]
TOKENS = (1, 2, 5, 8)
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-fno-exceptions", "-fno-rtti", "-static"]
KERNELS = ROOT / "src" / "tawny" / "kernels"
SOURCES = [
    Path(__file__).with_suffix(".cpp"),
    *map(KERNELS.joinpath, ("dispatch.cpp", "portable.cpp", "neon.cpp")),
]


class Case(NamedTuple):
    """What arm.cpp reads: the first letter of the name says what is done with numbers and arrays."""

    name: str
    numbers: tuple[int, ...]
    arrays: tuple[Tensor | None, ...]

    def bytes(self) -> bytes:
        name = self.name.encode()
        parts = [_int64s(len(name)), name, _int64s(len(self.numbers), *self.numbers, len(self.arrays))]
        for array in self.arrays:
            data = b"" if array is None else bit_pattern(array.contiguous()).numpy().tobytes()
            parts += [_int64s(len(data)), data]
        return b"".join(parts)


def _int64s(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def answers(exact: Tensor, magnitude: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The last two arrays: one rounding of the result and those of float32 sums are allowed."""
    allowed = ROUNDING[dtype] * exact.abs() + 2e-6 * magnitude + (1e-7 if dtype is torch.float16 else 0.0)
    return exact, allowed


def product(name: str, packed: PackedTensor, x: Tensor, bias: Tensor | None = None) -> Case:
    W, x64 = unpack(packed).double(), x.double()
    exact, magnitude = x64 @ W.T, x64.abs() @ W.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    if TABLE[packed.values].scaled:  # activations of 16 bits
        magnitude = magnitude + x64.abs().amax(-1, keepdim=True) / 32767 * 0.51e6 / 2 * W.abs().sum(1)
    w = packed.weight
    numbers = (w.rows, w.cols, w.kind.code or 0, w.span, FLOATS[x.dtype], len(x))
    return Case(name, numbers, (*w[:6], x, bias, *answers(exact, magnitude, x.dtype)))


def packed_cases(values: str, group: int | None, whole: bool) -> Iterator[Case]:
    """One kind's products and dense weights."""
    store = f"{values} {group} {'whole' if whole else 'masked'}"
    for shape in SHAPES:
        packed = pack(weight(shape, 0.0) if whole else uneven(shape), values, group, whole)
        w = packed.weight
        for dtype, code in FLOATS.items():
            for tokens in TOKENS if dtype is torch.float32 else TOKENS[1:3]:
                bias = torch.randn(shape[0]).to(dtype) if tokens % 2 == 0 else None
                name = f"packed {store} {shape} {dtype} tokens {tokens}"
                yield product(name, packed, activations(tokens, shape[1], dtype), bias)
            wanted = unpack(packed, dtype).double()
            numbers = (w.rows, w.cols, w.kind.code or 0, w.span, code)
            yield Case(f"expand {store} {shape} {dtype}", numbers, (*w[:6], wanted, None))
    packed = pack(weight((8, 128), 0.0), values, group, whole)
    for bad in (float("nan"), float("inf")):
        x = activations(2, 128, torch.float32)
        x[1, 17] = bad
        yield product(f"packed {store} with {bad}", packed, x)
    yield product(f"packed {store} tiny", packed, activations(2, 128, torch.float32) * 1e-36)
    packed = pack(uneven((37, 250)), values, group, whole)
    for tokens in (3, 4, 7, 32, 33):
        x = activations(tokens, 250, torch.float32)
        yield product(f"packed {store} (37, 250) tokens {tokens}", packed, x)


def wide_cases() -> Iterator[Case]:
    """The largest sums that 32 bits have to hold, and more tokens than are taken at once."""
    yield product(
        "packed int4 tokens 530", pack(uneven((5, 65)), "int4"), activations(530, 65, torch.float32)
    )
    for tokens in (1, 2, 3):
        for whole in (False, True):
            packed = pack(torch.ones(4, 70016), "int8", whole=whole)
            yield product(f"packed wide {whole} tokens {tokens}", packed, torch.ones(tokens, 70016))


def dense_cases() -> Iterator[Case]:
    for shape in SHAPES[:-1]:
        for kind, dtype in zip(FLOATS, (torch.bfloat16, torch.float16, torch.float32), strict=True):
            W, bias = weight(shape, 0.0).to(kind), torch.randn(shape[0]).to(dtype)
            for tokens in TOKENS:
                x = activations(tokens, shape[1], dtype)
                exact = x.double() @ W.double().T + bias.double()
                magnitude = x.double().abs() @ W.double().abs().T + bias.double().abs()
                numbers = (*shape, FLOATS[kind], FLOATS[dtype], tokens)
                name = f"dense {kind} {dtype} {shape} tokens {tokens}"
                yield Case(name, numbers, (W, x, bias, *answers(exact, magnitude, dtype)))


def between_cases() -> Iterator[Case]:
    """Normalise, gate, attend."""
    for dtype, code in FLOATS.items():
        for count in (1, 7, 64, 77, 200):
            x, w = torch.randn(2, count)
            x64 = x.double()
            exact = x64 / (x64.square().mean() + 1e-5).sqrt() * w.double()
            yield Case(f"norm {dtype} {count}", (count, code), (x, w, *answers(exact, exact.abs(), dtype)))
            exact = torch.nn.functional.silu(x64 * 8) * w.double()
            gated = (x * 8, w, *answers(exact, exact.abs(), dtype))
            yield Case(f"swish {dtype} {count}", (count, code), gated)
        for dim, tokens in ((4, 1), (8, 3), (40, 9), (67, 5)):
            stride = 2 * dim + 3
            q, k, v = torch.randn(4, dim), *torch.randn(2, tokens, stride).to(dtype)
            keys, past = (t[:, : 2 * dim].reshape(tokens, 2, dim).double() for t in (k, v))
            keys, past = keys.repeat_interleave(2, 1), past.repeat_interleave(2, 1)
            shares = torch.einsum("hd,thd->ht", q.double(), keys).mul(0.25).softmax(1)
            exact, magnitude = (torch.einsum("ht,thd->hd", shares, values) for values in (past, past.abs()))
            arrays = (q, k, v, *answers(exact, magnitude, dtype))
            yield Case(f"attend {dtype} {dim} {tokens}", (4, 2, dim, tokens, stride, code), arrays)


def pruning_cases() -> Iterator[Case]:
    """ALPS's passes and LSA's removal, over small integers and eighths, so that nothing is rounded."""
    for size in ((1, 1), (3, 5), (9, 31), (30, 257)):
        for zeros in (False, True):
            T, W, zero = problem(*size, zeros)
            W, count, name = W.mul(8).round().div(8), T.numel(), f"{size} {zeros}"
            D = torch.where(support(T, zero, 0.5), T, 0.0)
            moved = W + W.flip(0) + (T - D) * 0.5
            counts = spread(moved, zero, (0.4375, 0.625), 7)
            for dtype in (torch.float32, torch.bfloat16):
                exact = (0.5 * (D - W) - 0.25 * (T - D)).to(dtype).double()
                right = (T, W, None, zero, exact, None)
                yield Case(f"right {dtype} {name}", (count, FLOATS[dtype]), right)
                exact = moved.double()
                update = (T, W, W.flip(0).to(dtype), zero, exact, None, counts)
                yield Case(f"update {dtype} {name}", (count, FLOATS[dtype], 7), update)
            before, after = support(-T.flip(0), zero, 0.5), support(T, zero, 0.5)
            changed = int((before ^ after).sum())
            yield Case(f"change {name}", (count, changed), (T, zero, before, after))
    for rows, width in ((1, 1), (3, 5), (5, 37), (4, 64)):
        W, H = torch.randn(rows, width).mul(2).round(), torch.randn(width, width).mul(2).round()
        H, carried = H @ H.T, torch.randn(rows, width).mul(20).round()
        gone, paid = torch.zeros(rows, width), torch.zeros(rows)
        for row in range(rows):
            cost = W[row] * (W[row] * H.diagonal() + 2 * carried[row])
            for _ in range(width // 2):
                at = int(cost.numpy().argmin())
                gone[row, at], cost[at], paid[row] = W[row, at], 1e38, paid[row] + cost[at]
                cost += torch.where(cost < 1e38, 2 * W[row, at] * W[row] * H[at], 0.0)
        exact = gone.double()
        numbers, arrays = (rows, width), (W, H, carried, exact, None, paid.double())
        yield Case(f"half {rows} {width}", numbers, arrays)


def all_cases() -> Iterator[Case]:
    for values, group in EVERY:
        if TABLE[values].code is not None:
            for whole in (False, True):
                yield from packed_cases(values, group, whole)
    for part in (wide_cases, dense_cases, between_cases, pruning_cases):
        yield from part()
    # One answer is wrong, by twice what is allowed: a comparison that finds nothing would let it pass.
    right = product("wrong packed", pack(uneven((5, 65)), "int8"), activations(2, 65, torch.float32))
    exact, allowed = (array for array in right.arrays[-2:] if array is not None)
    exact[1, 1] += 2 * allowed[1, 1]
    yield right


def main() -> int:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not qemu:
        print("test-arm needs aarch64-linux-gnu-g++ and qemu-aarch64 (qemu-user); nothing was tested")
        return 0
    folder = ROOT / "build" / "arm"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with (folder / "cases").open("wb") as file:
        for case in all_cases():
            file.write(case.bytes())
    subprocess.run([compiler, *FLAGS, f"-I{KERNELS}", *SOURCES, "-o", folder / "check"], check=True)
    return subprocess.run([qemu, folder / "check", folder / "cases"]).returncode


if __name__ == "__main__":
    sys.exit(main())
