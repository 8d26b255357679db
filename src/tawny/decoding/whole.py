"""While a text is made, weights with masks are exchanged for whole ones, where this machine multiplies those faster.

Without an instruction that expands (AVX-512 has one), a mask takes a core about 20 cycles for 64 weights, however few are
left of them; 64 whole bytes take what memory takes. Few cores with fast memory multiply whole bytes faster, many cores that
share little memory traffic do not. So both are measured, on the model's own weights. The products are the same to the bit.
Integers of any kind become whole int8 with the scales they had. That is more memory: never more than half of what is free.

Bought: 1.4 to 1.7 × the tokens a second (1.1B shape, int8 at 70 %, AVX2, two threads).
"""

from __future__ import annotations

__all__ = ["exchanged"]

import time
from collections.abc import Sequence
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
_WORTH = 0.9  # of the time with masks: less is not worth the memory

_twins: WeakKeyDictionary[PackedLinear, PackedLinear] = WeakKeyDictionary()
_decided: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def exchanged(model: nn.Module) -> dict[PackedLinear, PackedLinear]:
    """What stands in for the model's masked integer linears; empty where masks are faster, or memory is short.

    It is decided once a model. The twins live as long as the linears they stand for.
    """
    # Kernels that expand add up in another order, too.
    if not native.chosen() or native.kernel_name() in native.EXPANDING:
        return {}
    masked = [
        module
        for module in model.modules()
        if isinstance(module, PackedLinear)
        and module.masks is not None
        and module.scales is not None
        and ops.readable(module.packed.weight)
    ]
    if model not in _decided:
        _decided[model] = _pays(masked)
    return {linear: _twin(linear) for linear in masked} if _decided[model] else {}


def _twin(linear: PackedLinear) -> PackedLinear:
    twin = _twins.get(linear)
    if twin is None or twin.scales is not linear.scales:  # its buffers were replaced
        twin = _twins[linear] = linear.holding(whole(linear.packed))
    return twin.train(linear.training)


def _pays(linears: Sequence[PackedLinear]) -> bool:
    wanted = sum(linear.in_features * linear.out_features for linear in linears)
    free = free_memory()
    if wanted < _SAMPLE or free is None or 2 * wanted > free:
        return False
    sample: list[PackedLinear] = []
    while sum(x.in_features * x.out_features for x in sample) < _SAMPLE:
        sample.append(linears[len(sample)])
    wholes = [whole(linear.packed).weight for linear in sample]
    masked = [linear.packed.weight for linear in sample]
    return _seconds(wholes) < _WORTH * _seconds(masked)


def _seconds(weights: Sequence[Weight]) -> float:
    """Of one token through all of them, the fastest of three times."""
    calls = [(ops.KernelCall(weight), torch.ones(1, weight.cols)) for weight in weights]
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for call, x in calls:
            call(x, None)
        times.append(time.perf_counter() - begin)
    return min(times)
