"""Where a CPU multiplies bfloat16 in hardware, and which float32 products may use that.

Such a unit (AMX, AVX512-BF16) multiplies bfloat16 numbers exactly and adds up in float32, several times faster than
float32 products run. So it changes nothing about products of values that are bfloat16 already, and costs the eighth bit
of others, which some algorithms do not feel. Float32 matrices are multiplied that way with AMX alone: on AVX512-BF16
oneDNN keeps them float32 whatever it is allowed, measured on an AMD EPYC.

Intel's processors since Sapphire Rapids have both, and hypervisors often hide AMX. What is left multiplies bfloat16 at
0.5 to 0.7 times the speed of float32 (docs/log/native-products.md). Theirs is the only AVX512-BF16 so far that comes with AVX512-FP16.

So there are three kinds of CPU, the keys of `cpu.PRODUCTS`, and everything that depends on the CPU's products asks
`products`. TAWNY_CPU makes any CPU pass for one of each kind: where there is no AMX, its rounding is done by hand.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tawny.cpu import asked
from tawny.errors import NumericalError, RecipeError

# oneDNN keeps what it makes for a product of each shape, about half a megabyte, and reads this when it first multiplies. Its own
# 1,024 are half a gigabyte where every expert has another number of tokens (docs/log/memory.md). A block has a few dozen shapes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
# The dtypes that can be asked for by name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype. Infinity that was there before is kept; more of it is a loss.

    Raises:
        NumericalError: a finite number would be infinity; names the tensor.
    """
    made = value.to(dtype)
    if dtype.is_floating_point and value.is_floating_point() and (lost := lost_in(value, made)) is not None:
        said = str(dtype).removeprefix("torch.")
        raise NumericalError(
            f"{name} {list(value.shape)} holds {lost:.4g}, which is infinity in {said}; "
            "choose a dtype that holds it (bfloat16 or float32), or leave dtype out"
        )
    return made


def lost_in(value: Tensor, made: Tensor) -> float | None:
    """The first finite number that is infinity in the floats `made` of it, or None."""
    if torch.finfo(made.dtype).max < torch.finfo(value.dtype).max:
        infinite = made.isinf()
        if infinite.any() and (lost := infinite & value.isfinite()).any():
            return float(value[lost][0])
    return None


@functools.cache
def _amx() -> bool:
    """Whether the CPU has AMX, and this torch can be told to round the factors of products for it."""
    told = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    return told and torch.cpu._is_amx_tile_supported()


def _fastest() -> str:
    """The products that suit this CPU best."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 cannot tell
    avx512 = torch.cpu._is_avx512_bf16_supported() and not capabilities.get("avx512_fp16", False)
    fast = avx512 or torch.cpu._is_amx_tile_supported()
    if not (fast and supported is not None and supported()):
        return "float32"
    return "amx" if _amx() else "bfloat16"


_products: str | None = None


def products() -> str:
    """How matrices are multiplied here: a key of `cpu.PRODUCTS`."""
    global _products
    if _products is None:
        _products = asked().products or _fastest()
    return _products


@contextlib.contextmanager
def force(wanted: str) -> Iterator[None]:
    """Multiply like another CPU inside the block: for tests and benchmarks, not for threads running at the same time.

    Args:
        wanted: a key of `cpu.PRODUCTS`.
    """
    global _products
    before, _products = products(), wanted
    try:
        yield
    finally:
        _products = before


def native_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it faster than float32, else float32."""
    return torch.float32 if products() == "float32" else torch.bfloat16


def forward_dtype(device: str | torch.device) -> torch.dtype:
    """What forwards on a device compute in by default: bfloat16 where it multiplies that natively, else float32."""
    if not str(device).startswith("cuda"):
        return native_dtype()
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def compute_dtype(compute: str, device: str = "cpu") -> torch.dtype:
    """The dtype of forwards that a name stands for; `auto` is what the device multiplies natively.

    Raises:
        RecipeError: an unknown name.
    """
    if compute == "auto":
        return forward_dtype(device)
    if compute not in DTYPES:
        raise RecipeError(f"compute {compute!r} is unknown; give auto, {', '.join(DTYPES)}")
    return DTYPES[compute]


def rounds_products() -> bool:
    """Whether `bfloat16_products` makes a difference."""
    return products() == "amx"


@contextlib.contextmanager
def bfloat16_products(wanted: bool = True) -> Iterator[None]:
    """Inside, float32 matrix products on a CPU round their factors to bfloat16 and add up in float32.

    Nothing changes if it is not wanted, or where `rounds_products` is false.
    """
    if not wanted or not rounds_products():
        yield
        return
    if not _amx():
        with _RoundedByHand():  # type: ignore[no-untyped-call]
            yield
        return
    switch: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to type checkers
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


class _RoundedByHand(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What AMX does to products of float32 matrices, on a CPU without it: slow, for `products=amx` in tests."""

    _FACTORS: ClassVar[dict[str, slice]] = {
        **dict.fromkeys(("mm", "bmm", "matmul", "linear"), slice(0, 2)),
        **dict.fromkeys(("addmm", "baddbmm"), slice(1, 3)),
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = self._FACTORS.get(func.__name__.partition(".")[0].rstrip("_"))
        if factors and all(x.dtype is torch.float32 and x.device.type == "cpu" for x in args[factors]):
            args = list(args)
            args[factors] = [x.bfloat16().float() for x in args[factors]]
        return func(*args, **(kwargs or {}))


def measured_speed(dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product on this machine, in `dtype`."""
    a = torch.randn(1024, 1024).to(dtype)
    a @ a
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)
