"""Compiled elementwise steps of ALPS (solvers/alps.py) between its matrix products: each reads and writes a weight once.

Shapes: R = rows, I = in. Weights are contiguous float32, what goes into a product and comes out of it float32 or
bfloat16, masks contiguous bool, all on the CPU; a mask of zeros may be None. Where that does not hold, or nothing was
compiled, the answer says so and nothing was touched.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tawny.kernels import native

BINS = 1 << 15  # of a histogram: as many as stay in a core's cache
_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_SHARE = 1 << 14  # weights a thread is worth waking for


def _threads(weights: int) -> int:
    return max(1, min(torch.get_num_threads(), weights // _SHARE))


def _usable(zero_RI: Tensor | None, *weights: Tensor) -> bool:
    tensors = weights if zero_RI is None else (*weights, zero_RI)
    return (
        native.chosen()
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
        and all(tensor.dtype is torch.float32 for tensor in weights)
    )


def _kind(product_RI: Tensor) -> int | None:
    """Of the elements of one side of a product, for the kernels; None if they do not take them."""
    if product_RI.device.type != "cpu" or not product_RI.is_contiguous():
        return None
    return _KINDS.get(product_RI.dtype)


def histogram(weights: int) -> Tensor:
    """Zeros for `update` over a weight of so many: int64 `[threads, 1 + BINS]`."""
    return torch.zeros(_threads(weights), 1 + BINS, dtype=torch.int64)


def right(
    T_RI: Tensor,
    W_RI: Tensor,
    zero_RI: Tensor | None,
    threshold: float,
    rho: float,
    before: float,
    out_RI: Tensor,
) -> bool:
    """`out` = ρ(D − W) − before·(T − D), D = T where |T| > threshold and it is not zero, else 0; False where it cannot."""
    kind = _kind(out_RI)
    if kind is None or not _usable(zero_RI, T_RI, W_RI):
        return False
    code = native.library().tawny_admm_right(
        T_RI.data_ptr(),
        W_RI.data_ptr(),
        native.address(zero_RI),
        out_RI.data_ptr(),
        kind,
        T_RI.numel(),
        threshold,
        rho,
        before,
        _threads(T_RI.numel()),
    )
    native.raise_for(code, f"a right side of shape {tuple(T_RI.shape)}")
    return True


def update(
    T_RI: Tensor,
    W_RI: Tensor,
    S_RI: Tensor,
    zero_RI: Tensor | None,
    threshold: float,
    rho: float,
    before: float,
    bounds: tuple[float, float],
    shift: int,
    counts: Tensor,
) -> bool:
    """T ← W + S + (T − D)·before/ρ, and how many of the new |T| lie where; False where it cannot.

    Args:
        bounds: (low, high), at least 0. counts: of `histogram`, added to: in column 0 how many |T| are at most low (a zero
            counts as 0), in column 1 + b how many lie in (low, high], b = (bits(|T|) − bits(low) − 1) >> shift < BINS.
    """
    kind = _kind(S_RI)
    if kind is None or not _usable(zero_RI, T_RI, W_RI):
        return False
    assert counts.dtype is torch.int64 and counts.is_contiguous() and counts.shape[1] == 1 + BINS
    code = native.library().tawny_admm_update(
        T_RI.data_ptr(),
        W_RI.data_ptr(),
        S_RI.data_ptr(),
        native.address(zero_RI),
        kind,
        T_RI.numel(),
        threshold,
        rho,
        before,
        *bounds,
        shift,
        counts.data_ptr(),
        BINS,
        min(_threads(T_RI.numel()), len(counts)),
    )
    native.raise_for(code, f"an iteration on a weight of shape {tuple(T_RI.shape)}")
    return True


def changes(T_RI: Tensor, zero_RI: Tensor | None, seen_RI: Tensor, threshold: float) -> int | None:
    """`seen` becomes |T| > threshold and no zero; in how many places it was not that; None where it cannot."""
    if not _usable(zero_RI, T_RI):
        return None
    assert seen_RI.dtype is torch.bool and seen_RI.is_contiguous() and seen_RI.shape == T_RI.shape
    changed = ctypes.c_int64()
    code = native.library().tawny_admm_support(
        T_RI.data_ptr(),
        native.address(zero_RI),
        seen_RI.data_ptr(),
        T_RI.numel(),
        threshold,
        ctypes.addressof(changed),
        _threads(T_RI.numel()),
    )
    native.raise_for(code, f"the support of a weight of shape {tuple(T_RI.shape)}")
    return changed.value
