"""Make sparsity pay: packed weights that take the bytes of their survivors, and CPU kernels that multiply them as they are.

packed = pack(weight, values="bf16")      # PackedTensor: masks, values, offsets
unpack(packed)                            # the same bits back
PackedLinear.from_linear(linear, "int8")  # an nn.Module that multiplies the packed weight as it is
kernel_name()                             # "avx512vbmi2", …, "torch"
"""

from __future__ import annotations

__all__ = [
    "VERSION",
    "DenseLinear",
    "PackedLinear",
    "PackedTensor",
    "check",
    "kernel_name",
    "pack",
    "pack_linear",
    "packed_bytes",
    "unpack",
    "worth_packing",
]

from .format import VERSION, PackedTensor, check, pack, packed_bytes, unpack
from .kernels.native import kernel_name
from .linear import DenseLinear, PackedLinear, pack_linear, worth_packing
