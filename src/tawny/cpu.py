"""What Tawny may use of this CPU: all of it, or what the environment variable TAWNY_CPU leaves.

`TAWNY_CPU="kernel=avx2 products=float32"` makes this CPU behave like a lesser one, so that each combination that it can
run can be compared and tested on it. Either part may be left out, and is then what suits the CPU best.

- `kernel=`: the best compiled kernel that exists. Those above it in `KERNELS` do not; `torch` means that there is none.
- `products=`: how matrices are multiplied, a key of `PRODUCTS` (see precision.py).
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from tawny.errors import UserError

# Index = level in the library (dispatch.cpp). `torch` is none of them: the fallback in plain torch.
KERNELS = ("portable", "avx2", "avxvnni", "avx512f", "avx512vnni", "avx512vbmi2", "neon")
PRODUCTS = {
    "float32": "float32 is the fastest type, and every product of float32 values is exact to float32's rounding",
    "bfloat16": "bfloat16 is faster (AVX512-BF16): forwards and what tolerates it are computed in it",
    "amx": "the same, and products of float32 values are rounded to bfloat16 where that is allowed (AMX)",
}
_ALLOWED = {"kernel": (*KERNELS, "torch"), "products": tuple(PRODUCTS)}


@dataclass(frozen=True)
class Cpu:
    """What TAWNY_CPU asks for; None where it leaves the choice to the CPU."""

    kernel: str | None = None
    products: str | None = None


@functools.cache
def asked() -> Cpu:
    """What the environment asks for, read once.

    Raises:
        UserError: it asks for something unknown, or by a name of former versions.
    """
    if former := os.environ.get("TAWNY_KERNEL"):
        raise UserError(f"TAWNY_KERNEL is not read any more; set TAWNY_CPU=kernel={former} instead")
    said = os.environ.get("TAWNY_CPU", "")
    parts = [part.partition("=") for part in said.replace(",", " ").split()]
    names = [name for name, _, _ in parts]
    if len(set(names)) < len(names) or any(value not in _ALLOWED.get(name, ()) for name, _, value in parts):
        expected = " and ".join(f"{name}={'|'.join(values)}" for name, values in _ALLOWED.items())
        raise UserError(f"TAWNY_CPU={said!r} is not understood; expected {expected}, or one of the two")
    return Cpu(**{name: value for name, _, value in parts})
