"""Refuse a packed weight whose tensors do not fit together, before any kernel reads it."""

from __future__ import annotations

import torch

from tawny.errors import CheckpointError
from tawny.kernels import native
from tawny.kernels.scales import long
from tawny.kinds import KINDS
from tawny.packed.format import PackedForm, PackedTensor


def check(packed: PackedTensor, name: str = "weight") -> None:
    """Refuse, by name, a packed weight that could make a kernel read past an array.

    Checks dtypes, shapes, the offsets against the population of every mask, that no bit is set in the padding, and
    that the scales are finite. It does not know what the values should be: that is a hash's task.

    Raises:
        CheckpointError: says what does not fit.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{name}: {what}; the packed file is damaged or was written by something else")

    if packed.whole and not KINDS[packed.values].scaled:
        raise refuse("a weight of floats has no masks")
    nnz = packed.shape[0] * packed.shape[1]
    offsets = packed.tensors.get("offsets")
    if not packed.whole or offsets is not None:
        if offsets is None or offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() < 2:
            raise refuse("offsets are not an int64 vector")
        if not 0 <= (nnz := int(offsets[-1])) <= packed.shape[0] * packed.shape[1]:
            raise refuse(f"{nnz} survivors in a weight of shape {packed.shape}")
    coded = "exponents" in packed.tensors
    wanted = PackedForm(packed.shape, packed.values, packed.group, nnz, packed.whole, coded).tensors()
    if wanted.keys() != packed.tensors.keys():
        raise refuse(f"tensors {sorted(packed.tensors)} where {sorted(wanted)} belong")
    for key, (dtype, size) in wanted.items():
        tensor = packed.tensors[key]
        if tensor.dtype != dtype or tuple(tensor.shape) != size or not tensor.is_contiguous():
            raise refuse(f"{key} is {tensor.dtype} {tuple(tensor.shape)} where {dtype} {size} belongs")
    if offsets is not None and (fault := native.check(packed.tensors["masks"], offsets, *packed.shape, nnz)):
        raise refuse(fault)
    floats = [packed.tensors[key] for key in ("scales", "sums") if key in wanted]
    if coded:
        floats[0] = long(floats[0], packed.tensors["exponents"])
    if not all(bool(torch.isfinite(tensor).all()) for tensor in floats):
        raise refuse("scales or sums hold NaN or infinity")
