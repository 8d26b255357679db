"""The products: `packed_linear`, `dense_linear`, and `expand` and `gather_rows`, which write a packed weight out.

Packed weights come as a `Weight`: tensors, an explicit kind and the columns of a scale. Nothing is inferred from a dtype
or a shape. What no compiled kernel takes goes to the twin in plain torch.

By the number of tokens T (rows of x): up to `DIRECT` the compiled kernel multiplies packed weights as they are;
above, a few hundred rows at a time are written out into a small buffer that stays in cache and torch's own matrix product runs.
Where float32 products are the fastest, the kernels of AVX2, of AVX-VNNI and of AVX-512 with VNNI take any number of tokens
of integers: they are about as fast as torch's product, or faster.
Where the CPU has no product of 16-bit floats, torch's takes up to eight times as long as the one in float32. There weights
and activations of many tokens are widened first, some rows at a time.
Results do not depend on the number of threads; they do depend, in the last bits, on T and on the kernel.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tawny.errors import UserError
from tawny.kernels import native, reference
from tawny.kernels.layout import ROWS, Weight
from tawny.precision import native_dtype

DIRECT = 32  # tokens a compiled kernel takes; more go through expand-then-GEMM
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # activations and results, by their C code


def readable(weight: Weight) -> bool:
    """Whether compiled kernels read this weight."""
    return weight.kind.code is not None and weight.values.device.type == "cpu"


def _compiled(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether a compiled kernel reads this weight, and computes in this type."""
    return readable(weight) and dtype in FLOATS and native.chosen()


def _most_direct(weight: Weight) -> int:
    """Tokens that the compiled kernel takes without expanding the weight."""
    quick = native_dtype() is torch.float32 and native.kernel_name() in ("avx2", "avxvnni", *native.EXPANDING)
    return sys.maxsize if weight.kind.scaled and quick else DIRECT


def _spelled(weight: Weight) -> tuple[int | None, ...]:
    """The first ten arguments of the C functions."""
    return (*map(native.address, weight[:6]), weight.rows, weight.cols, weight.kind.code, weight.span)


def _write_out(weight: Weight, out: Tensor, first: int, last: int, threads: int) -> None:
    """Rows of the groups `first` to `last` into the rows of `out`."""
    code = native.library().tawny_expand(
        *_spelled(weight), first, last, out.data_ptr(), FLOATS[out.dtype], weight.cols, threads
    )
    native.raise_for(code, f"expanding a packed weight of shape ({weight.rows}, {weight.cols})")


def expand(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight [rows, cols]."""
    if not _compiled(weight, dtype):
        return reference.expand(weight, dtype)
    out = weight.values.new_empty((weight.rows, weight.cols), dtype=dtype)
    _write_out(weight, out, 0, weight.groups, torch.get_num_threads())
    return out


def gather_rows(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows `ids` of a packed weight → [*ids.shape, cols]: what an embedding looks up."""
    wanted, back = torch.unique(ids.reshape(-1), return_inverse=True)
    if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < weight.rows:
        raise IndexError(
            f"token ids {int(wanted[0])} to {int(wanted[-1])} where 0 to {weight.rows - 1} are embedded"
        )
    compiled, device = _compiled(weight, dtype), weight.values.device
    rows = torch.empty(wanted.numel(), weight.cols, dtype=dtype, device=device)
    four = torch.empty(ROWS, weight.cols, dtype=dtype, device=device)
    before = -1
    for at, row in enumerate(wanted.tolist()):
        group = row // ROWS
        if group != before:
            before = group
            if compiled:
                _write_out(weight, four, group, group + 1, 1)
            else:
                four = reference.expand(weight, dtype, group, group + 1)
        rows[at] = four[row % ROWS]
    return rows[back].view(*ids.shape, weight.cols)


def check_bias(bias: Tensor, rows: int) -> None:
    """Refuse a bias that is not one value a row."""
    if bias.shape != (rows,):
        raise UserError(f"a bias of shape {tuple(bias.shape)} does not fit a weight of {rows} rows")


def _readable(bias: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    """A bias as the C functions read it."""
    if bias is None:
        return None
    check_bias(bias, rows)
    return (bias if bias.dtype is dtype else bias.to(dtype)).contiguous()


def packed_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias: x [..., cols] → [..., rows] in x's dtype."""
    rows, cols = weight.rows, weight.cols
    if x.shape[-1] != cols:
        raise UserError(
            f"activations of width {x.shape[-1]} do not fit a packed weight of shape ({rows}, {cols})"
        )
    if not (x.device.type == "cpu" and _compiled(weight, x.dtype)):
        return reference.packed_linear(x, weight, None if bias is None else bias.to(x.dtype))
    x = x.contiguous()
    bias = _readable(bias, rows, x.dtype)
    if x.numel() > _most_direct(weight) * cols:
        threads = torch.get_num_threads()

        def write(first: int, last: int, place: Tensor) -> Tensor:
            _write_out(weight, place, first // ROWS, -(-last // ROWS), threads)
            return place[: last - first]

        return _multiply_in_parts(x, rows, bias, write)
    y = KernelCall(weight)(x, bias)
    assert y is not None
    return y


def _addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors if tensor is not None])


class KernelCall:
    """The product with one packed weight with everything looked up beforehand: the path of eager decoding.

    It keeps the tensors whose addresses it uses alive; `fits` says whether they are still the module's own.
    """

    __slots__ = ("_at", "_held", "_library", "_memory", "_most", "cols", "rows", "weight")

    def __init__(self, weight: Weight) -> None:
        self.weight, self.rows, self.cols = weight, weight.rows, weight.cols
        self._library = native.library()
        spelled = _spelled(weight)
        self._memory = ctypes.create_string_buffer(self._library.tawny_describe(None, *spelled))
        self._at = ctypes.addressof(self._memory)
        self._library.tawny_describe(self._at, *spelled)
        self._held = _addresses(weight[:6])
        self._most = _most_direct(weight)

    @property
    def address(self) -> int:
        """Of the library's description of this weight; valid as long as the call lives."""
        return self._at

    def fits(self, buffers: dict[str, Tensor | None]) -> bool:
        """False once a buffer was replaced, or moved under its name."""
        tensors = masks, values, offsets, scales, exponents, sums = self.weight[:6]
        return (
            buffers["masks"] is masks
            and buffers["values"] is values
            and buffers["offsets"] is offsets
            and buffers["scales"] is scales
            and buffers["exponents"] is exponents
            and buffers["sums"] is sums
            and _addresses(tensors) == self._held
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """None where this path does not apply, and the general one must be taken."""
        dtype, shape = x.dtype, x.shape
        tokens = x.numel() // self.cols
        if tokens > self._most or dtype not in FLOATS or shape[-1] != self.cols or not x.is_contiguous():
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
            FLOATS[dtype],
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


def dense_direct() -> int:
    """The same as `DIRECT` for dense weights: past it torch's product is faster."""
    return DIRECT if native_dtype() is torch.float32 else 4


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type in which torch multiplies matrices of this type fastest."""
    return torch.float32 if native_dtype() is torch.float32 else dtype


def _multiply_in_parts(
    x: Tensor, rows: int, bias: Tensor | None, write: Callable[[int, int, Tensor], Tensor]
) -> Tensor:
    """Prefill: write out some rows, multiply, and so on; the weight never exists as a whole in the type of the product.

    write: (first, last, buffer) → rows [first, last) of the weight as the buffer's type, in the buffer or not.
    """
    cols, dtype = x.shape[-1], _computed_in(x.dtype)
    x_TI = x.view(-1, cols).to(dtype)
    # A power of two: torch's product shares other widths badly among its threads.
    wanted = max(64.0, CHUNK_BYTES / (cols * x_TI.element_size()))
    chunk = min(rows, 1 << round(math.log2(wanted)))
    y_TO = x_TI.new_empty(x_TI.shape[0], rows)
    bias = None if bias is None else bias.to(dtype)
    buffer = _buffer(chunk, cols, dtype)
    with torch.no_grad():
        for first in range(0, rows, chunk):
            last = min(first + chunk, rows)
            part_IO, place_TO = write(first, last, buffer).T, y_TO[:, first:last]
            if bias is None:
                torch.mm(x_TI, part_IO, out=place_TO)
            else:
                torch.addmm(bias[first:last], x_TI, part_IO, out=place_TO)
    return y_TO.to(x.dtype).view(*x.shape[:-1], rows)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """x Wᵀ + bias with a dense weight: our kernel for a few tokens, torch's product for more.

    transposed: the weight is stored `[in, out]`, as experts of some models are.
    """
    rows, cols = weight.shape[::-1] if transposed else weight.shape
    tokens = x.numel() // cols
    fits = (
        x.dtype is weight.dtype
        and x.dtype in FLOATS
        and weight.is_contiguous()
        and x.shape[-1] == cols
        and x.device.type == weight.device.type == "cpu"
        and native.chosen()
    )
    direct = tokens <= dense_direct()
    widened = not direct and _computed_in(x.dtype) is not x.dtype
    if not (fits and tokens > 0 and (direct or widened)):
        return torch.nn.functional.linear(x, weight.T if transposed else weight, bias)
    x = x.contiguous()
    bias = _readable(bias, rows, x.dtype)
    if widened:

        def widen(first: int, last: int, place: Tensor) -> Tensor:
            if transposed:
                return place.view(-1)[: cols * (last - first)].view(cols, -1).copy_(weight[:, first:last]).T
            return place[: last - first].copy_(weight[first:last])

        return _multiply_in_parts(x, rows, bias, widen)
    y = x.new_empty((*x.shape[:-1], rows))
    code = native.library().tawny_dense(
        weight.data_ptr(),
        rows,
        cols,
        FLOATS[weight.dtype],
        transposed,
        x.data_ptr(),
        native.address(bias),
        y.data_ptr(),
        FLOATS[x.dtype],
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
