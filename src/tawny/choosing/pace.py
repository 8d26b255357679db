"""What a token reads, at the pace of this machine: a speed becomes a number of bytes that a fit can spend.

Decoding one sequence reads every linear and the head once for each token, and one row of an embedding. So a token takes at
least as long as memory takes to stream those bytes. A kernel that is slower than memory counts its bytes as so many more as it
is slower. Both are measured here, on random weights of the model's commonest width. Attention, norms, sampling and the cache
are not counted, so a model is a little slower than this says; what it really does is measured once it is packed.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from tawny.allocation.profile import LinearInfo
from tawny.choosing.level import SPARSITIES, UNMEASURED, Level, Measures, levels_tried
from tawny.choosing.sizes import Limit
from tawny.decoding.whole import WORTH
from tawny.errors import MissingFeature
from tawny.kernels import native
from tawny.packed import format
from tawny.packed.format import PackedTensor
from tawny.packed.linear import DenseLinear, PackedLinear
from tawny.progress import Progress
from tawny.solvers.grid import ACCIDENTS

_STREAMED = 256_000_000  # bytes that no cache holds
_WEIGHTS = 1 << 20  # of the matrix whose copies are multiplied
_FEW, _CALLS = 4, 256  # rows of a matrix that takes no time, and how often it is multiplied
_ROUNDS = 5
DENSE = "dense"  # what `slower` calls a head that stays as it is


@dataclass(frozen=True)
class Pace:
    """What this machine reads in a second.

    Attributes:
        bandwidth: bytes a second that memory streams.
        slower: of each level (and `dense`), how many times as long a product takes as streaming its bytes; at least 1. A
            level that decoding runs without its mask takes what whole int8 takes.
        shape: of the matrices that were multiplied.
    """

    bandwidth: float
    slower: Mapping[str, float]
    shape: tuple[int, int]
    threads: int
    kernel: str

    @classmethod
    def from_mapping(cls, plain: Mapping[str, Any]) -> Pace:
        return cls(**{**plain, "shape": tuple(plain["shape"])})

    def budget(self, speed: float) -> float:
        """Bytes that may be read for each token at so many tokens a second."""
        return self.bandwidth / speed

    def told(self) -> str:
        """The assumption, in one line."""
        read = f"{self.bandwidth / 1e9:.1f} GB/s that {self.threads} thread{'s' * (self.threads > 1)} stream"
        whole = {kind: self.slower[_key(Level(0.0, kind))] for kind in ("int8", "int4", "int3")}
        times = ", ".join(f"{kind} {value:.2f}" for kind, value in whole.items())
        return (
            f"a token reads every linear and the head once, at {read} (a product by the {self.kernel} kernel takes so many times "
            f"as long as streaming: {times}); attention, norms and the cache are not counted"
        )


def _key(level: Level) -> str:
    return f"{level.kind}@{level.sparsity}"


def check_kernels() -> None:
    """
    Raises:
        MissingFeature: there are no compiled kernels, without which no speed is worth a promise.
    """
    if not native.chosen():
        raise MissingFeature(
            "a speed is reached by the compiled kernels, and they are missing: `tawny doctor` says how to get them; or give a size"
        )


def measured_pace(linears: tuple[LinearInfo, ...], progress: Progress) -> Pace:
    """Measure memory, and the kernel of each level, with torch's threads; raises as `check_kernels` does."""
    check_kernels()
    widths: Counter[int] = Counter()
    for linear in linears:
        widths[linear.shape[1]] += linear.numel
    columns = widths.most_common(1)[0][0]
    shape = (max(64, _WEIGHTS // columns), columns)
    every = levels_tried()
    progress.phase("measuring the speed of kernels", len(every) + 2, "kernels")
    threads, streamed = torch.get_num_threads(), torch.zeros(_STREAMED // 4)
    # Measured again before each kernel, because other guests of a machine slow memory down for a while: a kernel is compared
    # with the memory of its moment, and the best of all moments is the machine's.
    streams = [streamed.nbytes / _least(partial(native.stream, streamed, threads))]
    progress.step("memory")
    generator = torch.Generator().manual_seed(0)
    W_OI = torch.randn(shape, generator=generator)
    order_OI = torch.rand(shape, generator=generator)
    x_TI = torch.randn(1, columns, generator=generator).bfloat16()
    few = format.pack(W_OI[:_FEW], "int8", whole=True)
    call = _seconds([PackedLinear(few)] * _CALLS, x_TI)

    def against(make: Callable[[], Callable[[Tensor], Any]], size: int) -> float:
        streams.append(streamed.nbytes / _least(partial(native.stream, streamed, threads)))
        return _slower(make, size, x_TI, streams[-1], call)

    slower, sizes = {}, {}
    for level in every:
        packed = format.pack(W_OI * (order_OI >= level.sparsity), level.kind, whole=not level.sparsity)

        def multiplier(packed: PackedTensor = packed) -> Callable[[Tensor], Any]:
            tensors = {key: tensor.clone() for key, tensor in packed.tensors.items()}
            return PackedLinear(PackedTensor(tensors, packed.shape, packed.values, packed.group))

        sizes[_key(level)] = packed.nbytes
        slower[_key(level)] = against(multiplier, packed.nbytes)
        progress.step(_key(level))
    W_OI = W_OI.bfloat16()
    slower[DENSE] = against(lambda: DenseLinear(W_OI.clone()), W_OI.nbytes)
    progress.step(DENSE)
    if native.kernel_name() not in native.EXPANDING:
        slower |= without_masks(slower, sizes)
    return Pace(max(streams), slower, shape, threads, native.kernel_name())


def without_masks(slower: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """`slower` of the levels that decoding/whole.py runs as whole int8, because their masks take longer; `sizes` in bytes."""
    whole = slower[_key(Level(0.0, "int8"))] * sizes[_key(Level(0.0, "int8"))]
    masked = [_key(level) for level in levels_tried() if level.sparsity]
    return {key: whole / sizes[key] for key in masked if whole < WORTH * slower[key] * sizes[key]}


def _slower(
    make: Callable[[], Callable[[Tensor], Any]], size: int, x_TI: Tensor, bandwidth: float, call: float
) -> float:
    """How many times as long a product takes as streaming its bytes; copies of the matrix take turns, which no cache holds.

    A token of a packed model is one call, so the seconds of a `call` in Python are no part of a product.
    """
    copies = [make() for _ in range(math.ceil(_STREAMED / 2 / size))]
    return max(1.0, (_seconds(copies, x_TI) - call) * bandwidth / size)


def _seconds(products: Sequence[Callable[[Tensor], Any]], x_TI: Tensor) -> float:
    """Of one of them, where all are made one after the other."""

    def work() -> None:
        for multiply in products:
            multiply(x_TI)

    with torch.inference_mode():
        work()
        return _least(work) / len(products)


def _least(work: Callable[[], Any]) -> float:
    """Seconds, undisturbed."""
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@final
class ReadPerToken(Limit):
    """What each token reads, in bytes at the pace of memory; the same questions as those to a `PackedSize`.

    All experts count, because which ones a token takes is not known before.
    """

    rest = 0.0

    def __init__(self, sizes: Limit, pace: Pace) -> None:
        self._sizes, self._pace = sizes, pace

    def linear(
        self, info: LinearInfo, level: Level, group: int | None = None, measures: Measures = UNMEASURED
    ) -> float:
        # A weight that is sparse already is packed with a mask, whatever is removed.
        held = measures.had / info.numel if measures.had > ACCIDENTS * info.numel else 0.0
        run_as = max(s for s in SPARSITIES if s <= max(level.sparsity, held))
        slower = self._pace.slower[_key(replace(level, sparsity=run_as))]
        return slower * self._sizes.linear(info, level, group, measures)

    def of_head(self, kind: str | None) -> float:
        slower = self._pace.slower[DENSE if kind is None else _key(Level(0.0, kind))]
        return slower * self._sizes.of_head(kind)

    def of_embedding(self, kind: str | None) -> float:
        """A token reads one row."""
        return 0.0
