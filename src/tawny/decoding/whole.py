"""While a text is made, weights with masks are exchanged for whole ones, where this machine multiplies those faster.

Without an instruction that expands (AVX-512 has one), a mask takes a core about 20 cycles for 64 weights, however few are
left of them; 64 whole bytes take what memory takes. Few cores with fast memory multiply whole bytes faster, many cores that
share little memory traffic do not. So both are measured, on the model's own weights, for each kind and density by itself: an
int8 weight at 70 % may gain by its mask where an int3 one at 50 % does not. The products are the same to the bit.
Integers of any kind become whole int8 with the scales they had. That is more memory: never more than half of what is free.

Bought: 1.4 to 1.7 × the tokens a second (1.1B shape, int8 at 70 %, AVX2, two threads).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tawny.kernels import native, ops
from tawny.kernels.layout import Weight
from tawny.machine import free_memory
from tawny.packed.format import whole
from tawny.packed.linear import PackedLinear

_SAMPLE = (
    64 << 20
)  # whole bytes that are measured: more than a cache holds, and where fewer are in the model, nothing is done
WORTH = 0.9  # of the time with masks: less is not worth the memory

Sort = tuple[str, int]  # a kind, and tenths of the weights that are left

_twins: WeakKeyDictionary[PackedLinear, PackedLinear] = WeakKeyDictionary()
_decided: WeakKeyDictionary[nn.Module, Collection[Sort]] = WeakKeyDictionary()


def exchanged(model: nn.Module) -> dict[PackedLinear, PackedLinear]:
    """What stands in for the model's masked integer linears; none where masks are faster, or memory is short.

    It is decided once a model. The twins live as long as the linears they stand for.
    """
    # Kernels that expand add up in another order, too.
    if not native.chosen() or native.kernel_name() in native.EXPANDING:
        return {}
    sorts: dict[Sort, list[PackedLinear]] = defaultdict(list)
    for module in model.modules():
        if (
            isinstance(module, PackedLinear)
            and module.masks is not None
            and module.scales is not None
            and ops.readable(module.packed.weight)
        ):
            sorts[module.kind, round(10 * module.packed.nnz / _numel(module))].append(module)
    if model not in _decided:
        _decided[model] = _paying(sorts)
    return {linear: _twin(linear) for sort in _decided[model] for linear in sorts[sort]}


def _numel(linear: PackedLinear) -> int:
    return linear.in_features * linear.out_features


def _twin(linear: PackedLinear) -> PackedLinear:
    twin = _twins.get(linear)
    if twin is None or twin.scales is not linear.scales:  # its buffers were replaced
        twin = _twins[linear] = linear.holding(whole(linear.packed))
    return twin.train(linear.training)


def _paying(sorts: Mapping[Sort, Sequence[PackedLinear]]) -> list[Sort]:
    """The sorts whose linears are faster whole; as many as half of the free memory holds, those that gain most first."""
    sizes = {sort: sum(map(_numel, linears)) for sort, linears in sorts.items()}
    free = free_memory()
    if sum(sizes.values()) < _SAMPLE or free is None:
        return []
    sample = [
        (sort, linear) for sort, linears in sorts.items() for linear in _first(linears, _SAMPLE // len(sorts))
    ]
    masked = _seconds([linear.packed.weight for _, linear in sample])
    wholes = _seconds([whole(linear.packed).weight for _, linear in sample])
    shares = {}
    for sort in sorts:
        mine = [number for number, (owner, _) in enumerate(sample) if owner == sort]
        shares[sort] = sum(wholes[number] for number in mine) / sum(masked[number] for number in mine)
    paying: list[Sort] = []
    for sort in sorted(sorts, key=shares.__getitem__):
        if shares[sort] < WORTH and 2 * (sizes[sort] + sum(sizes[other] for other in paying)) <= free:
            paying.append(sort)
    return paying


def _first(linears: Sequence[PackedLinear], size: int) -> list[PackedLinear]:
    """As many linears as have `size` weights together, at least one."""
    taken: list[PackedLinear] = []
    for linear in linears:
        if taken and sum(map(_numel, taken)) >= size:
            break
        taken.append(linear)
    return taken


def _seconds(weights: Sequence[Weight]) -> list[float]:
    """Of one token through each of them, one after another so that no cache holds them: the least of three times."""
    calls = [(ops.KernelCall(weight), torch.ones(1, weight.cols)) for weight in weights]
    times = [float("inf")] * len(calls)
    for _ in range(3):
        for number, (call, x) in enumerate(calls):
            begin = time.perf_counter()
            call(x, None)
            times[number] = min(times[number], time.perf_counter() - begin)
    return times
