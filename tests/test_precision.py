"""Products that use a CPU's bfloat16 unit: exact where they can be, and never longer than asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tawny.calibration.statistics import Accumulator
from tawny.precision import bfloat16_products, native_dtype, rounds_products

HARDWARE = pytest.mark.skipif(
    not rounds_products(), reason="this CPU has no AMX, or this torch cannot be told to use it"
)


def product(size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    A, B = (torch.randn(size, size, generator=dice) for _ in range(2))
    return A, B, A @ B


@HARDWARE
def test_inside_factors_are_rounded_and_outside_they_are_not() -> None:
    A, B, outside = product()
    with bfloat16_products():
        inside = A @ B
    rounded = A.bfloat16().double() @ B.bfloat16().double()
    assert torch.allclose(inside.double(), rounded, atol=1e-4)
    assert not torch.allclose(inside, outside, atol=1e-4)
    assert torch.equal(A @ B, outside)


def test_an_error_inside_leaves_products_as_they_were(monkeypatch) -> None:
    switch = SimpleNamespace(fp32_precision="none")
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", switch, raising=False)
    monkeypatch.setattr("tawny.precision.rounds_products", lambda: True)
    with bfloat16_products(False):
        assert switch.fp32_precision == "none"
    with pytest.raises(ZeroDivisionError), bfloat16_products():
        assert switch.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert switch.fp32_precision == "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [48, 1100])
def test_hessians_are_as_exact_as_float32_sums_are(dtype: torch.dtype, width: int) -> None:
    X = torch.randn(200, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    accumulator = Accumulator(width, "hessian")
    for chunk in X.split(70):
        accumulator.add(chunk)
    H = accumulator.finish().hessian
    assert torch.allclose(H.double(), X.double().T @ X.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("amx", "bf16", "fp16", "expected"),
    [
        (True, True, True, torch.bfloat16),
        # A hypervisor hides AMX, and the other unit is slower than float32.
        (False, True, True, torch.float32),
        (False, True, False, torch.bfloat16),
        (False, False, False, torch.float32),
    ],
)
def test_bfloat16_is_native_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, amx: bool, bf16: bool, fp16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": fp16}, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    assert native_dtype.__wrapped__() is expected
