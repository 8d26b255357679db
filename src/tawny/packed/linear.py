"""`PackedLinear`: a linear whose weight is packed, and `DenseLinear`: one that stays dense but decodes faster.

A `PackedLinear` holds the tensors of one packed weight as buffers, so `state_dict`, `to(device="meta")` and loaders
work as usual. A loader makes it with `PackedLinear.empty(...)` under `torch.device("meta")` or not, and fills the
buffers later (`load_state_dict(..., assign=True)`); nothing is derived from them, so what was read is
what runs. Buffers keep their own types: `module.to(torch.float16)` changes the bias and never the packed tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tawny.errors import UserError
from tawny.kernels import native, ops
from tawny.packed import format, operators
from tawny.packed.format import PackedForm, PackedTensor

_TENSORS = ("masks", "values", "offsets", "scales", "exponents", "sums")


def _bias(bias: Tensor | None, rows: int) -> nn.Parameter | None:
    if bias is None:
        return None
    ops.check_bias(bias, rows)
    return nn.Parameter(bias, requires_grad=False)


class PackedLinear(nn.Module):
    """y = x Wᵀ + bias with W packed.

    `weight` is empty: it tells a model that asks what type its linears are of, and follows `model.to(dtype)`.
    """

    weight: Tensor
    masks: Tensor | None
    values: Tensor
    offsets: Tensor | None
    scales: Tensor | None
    exponents: Tensor | None
    sums: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self, packed: PackedTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.kind = packed.values
        self.group = packed.group
        for name in _TENSORS:
            self.register_buffer(name, packed.tensors.get(name))
        self.register_parameter("bias", _bias(bias, self.out_features))
        given = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        empty = torch.empty(0, packed.shape[1], dtype=given, device="cpu")
        self.register_buffer("weight", empty, persistent=False)
        self._call: ops.KernelCall | None = None

    @classmethod
    def from_linear(cls, linear: nn.Module, values: str = "bf16", group: int | None = None) -> PackedLinear:
        """Pack an `nn.Linear`, or a transformers `Conv1D` (which stores its weight transposed)."""
        W_OI = getattr(linear, "weight", None)
        if not isinstance(W_OI, Tensor) or W_OI.dim() != 2 or isinstance(linear, PackedLinear):
            raise UserError(f"{type(linear).__name__} has no weight matrix to pack; expected a linear")
        if not isinstance(linear, nn.Linear):
            W_OI = W_OI.T
        bias = getattr(linear, "bias", None)
        module = cls(
            format.pack(W_OI, values, group), None if bias is None else bias.detach().clone(), W_OI.dtype
        )
        return module.train(linear.training)

    def holding(self, packed: PackedTensor) -> Self:
        """A module that stands in for this one, with another tensor of the same shape."""
        return type(self)(packed, self.bias, self.weight.dtype).train(self.training)

    @classmethod
    def empty(
        cls,
        form: PackedForm,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> PackedLinear:
        """Uninitialised buffers of the right types and shapes, on `device` ("meta" costs nothing), to be filled."""
        wanted = form.tensors()
        tensors = {key: torch.empty(size, dtype=kind, device=device) for key, (kind, size) in wanted.items()}
        return cls(
            PackedTensor(tensors, form.shape, form.values, form.group),
            torch.empty(form.shape[0], dtype=dtype, device=device) if bias else None,
            dtype,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def packed(self) -> PackedTensor:
        """The packed weight; its tensors are the buffers themselves."""
        tensors = {name: t for name in _TENSORS if (t := getattr(self, name)) is not None}
        return PackedTensor(tensors, self.shape, self.kind, self.group)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out, in]: bit for bit what was packed, for float kinds and dtype None."""
        return format.unpack(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        buffers, bias = self._buffers, self._parameters["bias"]
        plain = _plain(x, bias)
        if plain and native.chosen() and x.device.type == "cpu":
            if (call := self._call) is None or not call.fits(buffers):
                call = self._prepare()
            if call is not None and (y := call(x, bias)) is not None:
                return y
        weight = self.packed.weight
        if plain:
            return ops.packed_linear(x, weight, bias)
        if not torch.compiler.is_compiling() and _transformed():
            W_OI = operators.expand(weight, x.dtype)
            return nn.functional.linear(x, W_OI, None if bias is None else bias.to(x.dtype))
        return operators.packed_linear(x, weight, bias)

    def _prepare(self) -> ops.KernelCall | None:
        """Look everything up once, and again after a buffer was replaced; None for what no compiled kernel reads."""
        weight = self.packed.weight
        compiled = ops.readable(weight)
        self._call = ops.KernelCall(weight) if compiled else None
        return self._call

    def prepared(self) -> ops.KernelCall | None:
        """The compiled call with this weight, for code that makes many of them; None without one."""
        if not native.chosen():
            return None
        return self._call if self._call is not None and self._call.fits(self._buffers) else self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_call": None}  # addresses mean nothing to a copy

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        """Move buffers between devices but never change their types: the format fixes those."""

        def keep_type(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        (bias, weight), self.bias = (self.bias, self.weight), None
        super()._apply(keep_type, recurse)  # type: ignore[no-untyped-call]
        self.weight = fn(weight)
        self.bias = None if bias is None else nn.Parameter(fn(bias.data), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        out, columns = self.shape
        group = f", group={self.group}" if self.group else ""
        return f"in_features={columns}, out_features={out}, values={self.kind}{group}, bias={self.bias is not None}"


# Looked up once: a token asks a hundred times.
_tracing, _transforming = torch._C._get_tracing_state, torch._C._functorch.peek_interpreter_stack


def _plain(x: Tensor, *parameters: Tensor | None) -> bool:
    """An ordinary eager call: nothing traces, fakes, transforms or differentiates, so torch's dispatcher adds only time."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)))
        and not torch._C._len_torch_dispatch_stack()
        and _tracing() is None
        and not _transformed()
    )


def _transformed() -> bool:
    """Inside of torch.func or forward-mode differentiation, which see through torch's own product and not through ours."""
    return _transforming() is not None or forward_ad._current_level >= 0


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """x Wᵀ + bias with a dense weight `[out, in]`, or `[in, out]` if transposed, by our kernel where it applies."""
    if _plain(x, weight, bias):
        return ops.dense_linear(x, weight, bias, transposed)
    weight = weight.T if transposed else weight
    if not torch.compiler.is_compiling() and _transformed():
        return nn.functional.linear(x, weight, bias)
    return operators.dense_linear(x, weight, bias)


class DenseLinear(nn.Module):
    """y = x Wᵀ + bias with W dense and our matrix-vector kernel: for linears that stay dense, and as a baseline."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = _bias(bias, self.out_features)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> DenseLinear:
        """Share the linear's own tensors; nothing is copied."""
        return cls(linear.weight.data, None if linear.bias is None else linear.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def pack_linear(linear: nn.Module, values: str = "bf16", group: int | None = None) -> PackedLinear:
    """A linear of one's own, packed.

    Args:
        linear: its weight `[out, in]`, or `[in, out]` of transformers' Conv1D, floats of 16 bits or more.
        values: kind of the survivors, such as bf16 or int8.
        group: columns that share a scale, of integers; None is the kind's usual number.

    Raises:
        UserError: unknown values or group.
        NumericalError: a weight is not finite, or too large for the kind.
    """
    return PackedLinear.from_linear(linear, values, group)
