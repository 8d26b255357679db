"""The kernels' products as `torch.ops.tawny.*`, for `torch.compile`, `torch.export` and autograd.

They have fake implementations and a gradient for the activations, so `torch.compile`, `torch.export` and backward
through a packed layer work. A kind crosses torch's border by its name in the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tawny.kernels import ops
from tawny.kernels.layout import Weight
from tawny.kinds import KINDS

_WEIGHT = (
    "Tensor? masks, Tensor values, Tensor? offsets, Tensor? scales, Tensor? exponents, Tensor? sums, "
    "int rows, int cols, str kind, int span"
)


def _weight(parts: tuple[Any, ...]) -> Weight:
    return Weight._make((*parts[:8], KINDS[parts[8]], parts[9]))


def _spelled(weight: Weight) -> tuple[Any, ...]:
    return (*weight[:8], weight.kind.name, weight.span)


def packed_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias."""
    product: Tensor = torch.ops.tawny.packed_linear(x, bias, *_spelled(weight))
    return product


def expand(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight [rows, cols]."""
    expanded: Tensor = torch.ops.tawny.expand(dtype, *_spelled(weight))
    return expanded


def gather_rows(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows `ids` of a packed weight → [*ids.shape, cols]."""
    rows: Tensor = torch.ops.tawny.gather_rows(ids, dtype, *_spelled(weight))
    return rows


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias with a dense weight."""
    product: Tensor = torch.ops.tawny.dense_linear(x, weight, bias)
    return product


def _define(name: str, signature: str, real: Any, fake: Any) -> None:
    torch.library.define(f"tawny::{name}", signature)
    torch.library.impl(f"tawny::{name}", "default", real)
    torch.library.register_fake(f"tawny::{name}", fake)


_define(
    "packed_linear",
    f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor",
    lambda x, bias, *parts: ops.packed_linear(x, _weight(parts), bias),
    lambda x, bias, *parts: x.new_empty((*x.shape[:-1], parts[6])),
)
_define(
    "expand",
    f"(ScalarType dtype, {_WEIGHT}) -> Tensor",
    lambda dtype, *parts: ops.expand(_weight(parts), dtype),
    lambda dtype, *parts: parts[1].new_empty(parts[6:8], dtype=dtype),
)
_define(
    "gather_rows",
    f"(Tensor ids, ScalarType dtype, {_WEIGHT}) -> Tensor",
    lambda ids, dtype, *parts: ops.gather_rows(ids, _weight(parts), dtype),
    lambda ids, dtype, *parts: parts[1].new_empty((*ids.shape, parts[7]), dtype=dtype),
)
_define(
    "dense_linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    ops.dense_linear,
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


def _packed_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, bias, *parts = inputs
    ctx.save_for_backward(*parts[:6])
    ctx.facts, ctx.dtype, ctx.has_bias = parts[6:], x.dtype, bias is not None


def _packed_backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Packed weights are frozen: the gradient goes to the activations and the bias."""
    W_OI = torch.ops.tawny.expand(ctx.dtype, *ctx.saved_tensors, *ctx.facts)
    grad_bias = grad.reshape(-1, ctx.facts[0]).sum(0) if ctx.has_bias else None
    return (grad @ W_OI, grad_bias, *[None] * 10)


def _dense_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.has_bias = inputs[2] is not None


def _dense_backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    flat = grad.reshape(-1, weight.shape[0])
    return grad @ weight, flat.T @ x.reshape(-1, weight.shape[1]), flat.sum(0) if ctx.has_bias else None


torch.library.register_autograd("tawny::packed_linear", _packed_backward, setup_context=_packed_context)
torch.library.register_autograd("tawny::dense_linear", _dense_backward, setup_context=_dense_context)
