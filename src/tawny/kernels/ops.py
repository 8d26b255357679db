"""The calls: `packed_linear`, `expand` and `dense_linear` on tensors, and the same three as `torch.ops.tawny.*`.

The operators have fake implementations and a gradient for the activations, so `torch.compile`, `torch.export` and
backward through a packed layer work. Eager decoding calls the plain functions and skips torch's dispatcher.

By the number of tokens T (rows of x): up to `DIRECT` the compiled kernel multiplies packed weights as they are;
above, a few hundred rows at a time are expanded into a small buffer that stays in cache and torch's own matrix product runs.
Results do not depend on the number of threads; they do depend, in the last bits, on T and on the kernel.
"""

from __future__ import annotations

__all__ = ["DIRECT", "Call", "check_bias", "dense_linear", "expand", "packed_linear", "remove_half"]

import ctypes
import math
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tawny.errors import UserError
from tawny.kernels import native, reference
from tawny.packed.format import PackedTensor

DIRECT = 32  # tokens a compiled kernel takes; more go through expand-then-GEMM
DENSE_DIRECT = 4  # the same for dense weights: past it torch's product is faster
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "int8"}


def _weight(
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    rows: int,
    cols: int,
) -> tuple[int | None, ...]:
    """The first nine arguments of the C functions."""
    return (
        masks.data_ptr(),
        values.data_ptr(),
        offsets.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if sums is None else sums.data_ptr(),
        rows,
        cols,
        KINDS[values.dtype],
        128 if scales is not None and scales.dim() == 3 else 0,
    )


def _as_packed(
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    rows: int,
    cols: int,
) -> PackedTensor:
    tensors = {"masks": masks, "values": values, "offsets": offsets}
    if scales is not None and sums is not None:
        tensors |= {"scales": scales, "sums": sums}
    group = 128 if scales is not None and scales.dim() == 3 else None
    return PackedTensor(tensors, (rows, cols), _NAMES[values.dtype], group)  # type: ignore[arg-type]


def expand(
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [rows, cols]."""
    if not (native.chosen() and masks.device.type == "cpu" and dtype in KINDS and dtype is not torch.int8):
        return reference.expand(_as_packed(masks, values, offsets, scales, sums, rows, cols), dtype)
    out = masks.new_empty((rows, cols), dtype=dtype)
    code = native.library().tawny_expand(
        *_weight(masks, values, offsets, scales, sums, rows, cols),
        0,
        masks.shape[0],
        out.data_ptr(),
        KINDS[dtype],
        cols,
        torch.get_num_threads(),
    )
    native.raise_for(code, f"expanding a packed weight of shape ({rows}, {cols})")
    return out


def check_bias(bias: Tensor, rows: int) -> None:
    """Refuse a bias that is not one value a row."""
    if bias.shape != (rows,):
        raise UserError(f"a bias of shape {tuple(bias.shape)} does not fit a weight of {rows} rows")


def _readable(bias: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A bias as the C functions read it."""
    check_bias(bias, rows)
    return (bias if bias.dtype is dtype else bias.to(dtype)).contiguous()


def packed_linear(
    x: Tensor,
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    rows: int,
    cols: int,
) -> Tensor:
    """x Wᵀ + bias: x [..., cols] → [..., rows] in x's dtype."""
    if x.shape[-1] != cols:
        raise UserError(
            f"activations of width {x.shape[-1]} do not fit a packed weight of shape ({rows}, {cols})"
        )
    if not (native.chosen() and x.device.type == "cpu" and x.dtype in KINDS and masks.device.type == "cpu"):
        packed = _as_packed(masks, values, offsets, scales, sums, rows, cols)
        return reference.packed_linear(x, packed, None if bias is None else bias.to(x.dtype))
    x = x.contiguous()
    tokens = x.numel() // cols
    if bias is not None:
        bias = _readable(bias, rows, x.dtype)
    weight = _weight(masks, values, offsets, scales, sums, rows, cols)
    if tokens > DIRECT:
        y = _expand_then_multiply(x.view(tokens, cols), weight, masks.shape[0], bias)
        return y.view(*x.shape[:-1], rows)
    y = x.new_empty((*x.shape[:-1], rows))
    code = native.library().tawny_packed(
        *weight,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        KINDS[x.dtype],
        tokens,
        torch.get_num_threads(),
    )
    native.raise_for(code, f"a packed linear of shape ({rows}, {cols})")
    return y


def _addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors if tensor is not None])


class Call:
    """The product with one packed weight with everything looked up beforehand: the path of eager decoding.

    It keeps the tensors whose addresses it uses alive; `fits` says whether they are still the module's own.
    """

    __slots__ = ("_at", "_held", "_library", "_memory", "cols", "rows", "tensors")

    def __init__(
        self, tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], rows: int, cols: int
    ) -> None:
        self.tensors, self.rows, self.cols = tensors, rows, cols
        self._library = native.library()
        weight = _weight(*tensors, rows, cols)
        self._memory = ctypes.create_string_buffer(self._library.tawny_describe(None, *weight))
        self._at = ctypes.addressof(self._memory)
        self._library.tawny_describe(self._at, *weight)
        self._held = _addresses(tensors)

    @property
    def address(self) -> int:
        """Of the library's description of this weight; valid as long as the call lives."""
        return self._at

    def fits(self, buffers: dict[str, Tensor | None]) -> bool:
        """False once a buffer was replaced, or moved under its name."""
        masks, values, offsets, scales, sums = self.tensors
        return (
            buffers["masks"] is masks
            and buffers["values"] is values
            and buffers["offsets"] is offsets
            and buffers["scales"] is scales
            and buffers["sums"] is sums
            and _addresses(self.tensors) == self._held
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """None where this path does not apply, and the general one must be taken."""
        dtype, shape = x.dtype, x.shape
        tokens = x.numel() // self.cols
        if tokens > DIRECT or dtype not in FLOATS or shape[-1] != self.cols or not x.is_contiguous():
            return None
        if bias is not None and not (
            bias.dtype is dtype and bias.numel() == self.rows and bias.is_contiguous()
        ):
            return None
        y = x.new_empty((*shape[:-1], self.rows))
        code = self._library.tawny_packed_at(
            self._at,
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            KINDS[dtype],
            tokens,
            torch.get_num_threads(),
        )
        if code:
            native.raise_for(code, f"a packed linear of shape ({self.rows}, {self.cols})")
        return y


# Expanded rows at a time: enough for an efficient product, little enough to stay in cache.
CHUNK_BYTES = 9 << 19
_scratch = threading.local()


def _buffer(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Memory for expanded rows, kept from call to call: fresh pages would cost more than the expansion."""
    kept: Tensor | None = getattr(_scratch, "buffer", None)
    count = rows * cols * dtype.itemsize
    if kept is None or kept.numel() < count:
        with torch.inference_mode(False):
            kept = _scratch.buffer = torch.empty(count, dtype=torch.uint8, device="cpu")
    return kept[:count].view(dtype).view(rows, cols)


def _expand_then_multiply(
    x_TI: Tensor, weight: tuple[int | None, ...], groups: int, bias: Tensor | None
) -> Tensor:
    """Prefill: expand some rows, multiply, and so on; the dense weight never exists as a whole."""
    rows, cols = int(weight[5] or 0), x_TI.shape[1]
    # A power of two: torch's product shares other widths badly among its threads.
    wanted = max(64.0, CHUNK_BYTES / (cols * x_TI.element_size()))
    chunk = min(rows, 1 << round(math.log2(wanted)))
    y_TO = x_TI.new_empty(x_TI.shape[0], rows)
    buffer = _buffer(chunk, cols, x_TI.dtype)
    run, kind, threads = native.library().tawny_expand, KINDS[x_TI.dtype], torch.get_num_threads()
    with torch.no_grad():
        for first in range(0, rows, chunk):
            last = min(first + chunk, rows)
            groups_of = first // 4, min(-(-last // 4), groups)
            code = run(*weight, *groups_of, buffer.data_ptr(), kind, cols, threads)
            native.raise_for(code, f"expanding a packed weight of shape ({rows}, {cols})")
            part_IO, place_TO = buffer[: last - first].T, y_TO[:, first:last]
            if bias is None:
                torch.mm(x_TI, part_IO, out=place_TO)
            else:
                torch.addmm(bias[first:last], x_TI, part_IO, out=place_TO)
    return y_TO


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias with a dense weight: our matrix-vector kernel for a few tokens, torch's product for more."""
    rows, cols = weight.shape
    tokens = x.numel() // cols
    fits = x.dtype is weight.dtype and x.dtype in KINDS and weight.is_contiguous() and x.shape[-1] == cols
    if not (
        fits
        and 0 < tokens <= DENSE_DIRECT
        and native.chosen()
        and x.device.type == weight.device.type == "cpu"
    ):
        return torch.nn.functional.linear(x, weight, bias)
    x = x.contiguous()
    if bias is not None:
        bias = _readable(bias, rows, x.dtype)
    y = x.new_empty((*x.shape[:-1], rows))
    code = native.library().tawny_dense(
        weight.data_ptr(),
        rows,
        cols,
        KINDS[weight.dtype],
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        KINDS[x.dtype],
        tokens,
        torch.get_num_threads(),
    )
    native.raise_for(code, f"a dense linear of shape ({rows}, {cols})")
    return y


def remove_half(W_OK: Tensor, H_KK: Tensor, carried_OK: Tensor, removed_OK: Tensor, paid_O: Tensor) -> bool:
    """Greedy removal of half of each row's columns by the compiled kernel (see allocation/lsa.py); False without one.

    Args:
        W_OK, removed_OK: float32 views of rows that are equally far apart; H_KK: of float32 rows; carried_OK: contiguous.
        paid_O: float64, what the removals cost is added to it.
    """
    if not (native.chosen() and W_OK.device.type == "cpu"):
        return False
    assert W_OK.stride() == removed_OK.stride() and W_OK.stride(1) == H_KK.stride(1) == 1
    assert W_OK.dtype is H_KK.dtype is carried_OK.dtype is torch.float32 and paid_O.dtype is torch.float64
    assert carried_OK.is_contiguous()
    tensors = (W_OK, H_KK, carried_OK, removed_OK, paid_O)
    code = native.library().tawny_remove_half(
        *(tensor.data_ptr() for tensor in tensors),
        *W_OK.shape,
        W_OK.stride(0),
        H_KK.stride(0),
        torch.get_num_threads(),
    )
    native.raise_for(code, f"removing half of a weight of shape {tuple(W_OK.shape)}")
    return True


# ------------------------------------------------------------------------------------------ registration with torch

_PACKED = "Tensor masks, Tensor values, Tensor offsets, Tensor? scales, Tensor? sums"
torch.library.define(
    "tawny::packed_linear", f"(Tensor x, {_PACKED}, Tensor? bias, int rows, int cols) -> Tensor"
)
torch.library.define("tawny::expand", f"({_PACKED}, int rows, int cols, ScalarType dtype) -> Tensor")
torch.library.define("tawny::dense_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("tawny::packed_linear", "default", packed_linear)
torch.library.impl("tawny::expand", "default", expand)
torch.library.impl("tawny::dense_linear", "default", dense_linear)


def _packed_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[-2]))


def _expand_fake(masks: Tensor, *rest: Any) -> Tensor:
    rows, cols, dtype = rest[-3:]
    empty: Tensor = masks.new_empty((rows, cols), dtype=dtype)
    return empty


def _dense_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


torch.library.register_fake("tawny::packed_linear", _packed_fake)
torch.library.register_fake("tawny::expand", _expand_fake)
torch.library.register_fake("tawny::dense_linear", _dense_fake)


def _packed_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *weight, bias, rows, cols = inputs
    ctx.save_for_backward(*weight)
    ctx.shape, ctx.dtype, ctx.has_bias = (rows, cols), x.dtype, bias is not None


def _packed_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Packed weights are frozen: the gradient goes to the activations and the bias."""
    W_OI = torch.ops.tawny.expand(*ctx.saved_tensors, *ctx.shape, ctx.dtype)
    grad_bias = grad.reshape(-1, ctx.shape[0]).sum(0) if ctx.has_bias else None
    return grad @ W_OI, None, None, None, None, None, grad_bias, None, None


def _dense_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.has_bias = inputs[2] is not None


def _dense_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    flat = grad.reshape(-1, weight.shape[0])
    return grad @ weight, flat.T @ x.reshape(-1, weight.shape[1]), flat.sum(0) if ctx.has_bias else None


torch.library.register_autograd("tawny::packed_linear", _packed_backward, setup_context=_packed_context)
torch.library.register_autograd("tawny::dense_linear", _dense_backward, setup_context=_dense_context)
