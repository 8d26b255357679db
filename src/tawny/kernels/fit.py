"""The compiled step of solvers/grid.py: nearest levels by given scales, and the scales that fit these best."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tawny.kernels import native

_SHARE = 1 << 14  # weights a thread is worth waking for
_COUNTS = (4, 8, 16)  # levels that a loop is compiled for, beside all integers of a range


@functools.cache
def _loop(levels: tuple[int, ...]) -> tuple[Tensor, int] | None:
    """Levels as the kernel takes them, and how many: the ends, and 0, for all integers of a range. None where no loop fits."""
    if levels[-1] - levels[0] == len(levels) - 1:
        return torch.tensor([levels[0], levels[-1]], dtype=torch.float32), 0
    return (torch.tensor(levels, dtype=torch.float32), len(levels)) if len(levels) in _COUNTS else None


def fit(
    X_OI: Tensor,
    scales_OS: Tensor,
    levels: tuple[int, ...],
    group: int,
    weights_I: Tensor | None,
    keep_OI: Tensor | None,
    made_OI: Tensor | None = None,
    lost: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Least-squares scales [O, S] for the levels nearest to X by `scales_OS`, and the squares that they save; None where it cannot.

    Args:
        X_OI: float32; a scale belongs to `group` columns of it, S = ceil(I / group).
        levels: ascending.
        weights_I, keep_OI: float32 and bool: what a squared error counts, and what of it counts at all.
        made_OI: becomes level · scale where kept, else +0.
        lost: bits of a float32 that the fitted scales in `made` do without; None: it has the given scales.
    """
    given = [X_OI, scales_OS, *(t for t in (weights_I, made_OI) if t is not None)]
    usable = native.chosen() and all(
        t.device.type == "cpu" and t.is_contiguous() and t.dtype is torch.float32 for t in given
    )
    loop = _loop(levels)
    if not usable or loop is None or (keep_OI is not None and not keep_OI.is_contiguous()):
        return None
    rows, width = X_OI.shape
    fitted_OS, saved_OS = torch.empty_like(scales_OS), torch.empty_like(scales_OS)
    code = native.library().tawny_fit(
        X_OI.data_ptr(),
        native.address(weights_I),
        native.address(keep_OI),
        loop[0].data_ptr(),
        loop[1],
        scales_OS.data_ptr(),
        fitted_OS.data_ptr(),
        saved_OS.data_ptr(),
        native.address(made_OI),
        rows,
        width,
        group,
        lost or 0,
        max(1, min(torch.get_num_threads(), rows, X_OI.numel() // _SHARE)),
    )
    native.raise_for(code, f"a grid for a weight of shape {tuple(X_OI.shape)}")
    return fitted_OS, saved_OS
