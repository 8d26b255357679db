"""Time and count every matrix product that torch runs, by the dtype that factors are multiplied in."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def rounding() -> bool:
    """Whether float32 factors are rounded to bfloat16 just now (`tawny.precision.bfloat16_products`)."""
    switch: Any = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(switch, "fp32_precision", "none") == "bf16"


class Products(TorchDispatchMode):
    """While it is entered, products add up: operations by torch's own formulas, and wall seconds on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: defaultdict[str, float] = defaultdict(float)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        # An in-place product counts like the other; the registry knows it under one name.
        self._formulas = {str(packet): formula for packet, formula in flop_registry.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(str(func.overloadpacket).rstrip("_"))
        if formula is None:
            return func(*args, **kwargs)
        start = time.perf_counter()
        made = func(*args, **kwargs)
        spent = time.perf_counter() - start
        shapes = {key: value for key, value in kwargs.items() if key != "out"}
        dtype = next(str(value.dtype) for value in args if isinstance(value, Tensor))
        if dtype == "torch.float32" and rounding():
            dtype = "torch.bfloat16"
        self._operations[dtype] += formula(*args, **shapes, out_val=made)
        self._seconds[dtype] += spent
        return made

    def made(self) -> dict[str, dict[str, float]]:
        """`{dtype: {operations, seconds}}`."""
        return {
            dtype: {"operations": self._operations[dtype], "seconds": self._seconds[dtype]}
            for dtype in self._operations
        }
