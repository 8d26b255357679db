"""Products that use a CPU's bfloat16 unit: exact where they can be, and never longer than asked."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tawny import precision
from tawny.calibration.statistics import Accumulator
from tawny.precision import bfloat16_products


def product(size: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    A, B = (torch.randn(size, size, generator=dice) for _ in range(2))
    return A, B, A @ B


FORMATS = {
    "mm": lambda A, B: A @ B,
    "inference": torch.inference_mode()(lambda A, B: A @ B),
    "linear": lambda A, B: torch.nn.functional.linear(A, B.T),
    "addmm_": lambda A, B: torch.zeros(len(A), len(A)).addmm_(A, B),
    "bmm": lambda A, B: (A[None] @ B[None])[0],
    "out": lambda A, B: torch.mm(A, B, out=torch.empty(len(A), len(A))),
}


@pytest.mark.parametrize("multiply", FORMATS.values(), ids=FORMATS)
def test_inside_factors_are_rounded_and_outside_they_are_not(products: str, multiply) -> None:
    """By the CPU where it has AMX, by hand elsewhere; where nothing is rounded, nothing changes."""
    A, B, outside = product()
    with bfloat16_products():
        inside = multiply(A, B)
    rounded = A.bfloat16().double() @ B.bfloat16().double()
    assert torch.allclose(inside.double(), rounded if products == "amx" else outside.double(), atol=1e-4)
    assert torch.allclose(inside, outside, atol=1e-4) == (products != "amx")
    assert torch.equal(A @ B, outside)


def test_an_error_inside_leaves_products_as_they_were(monkeypatch) -> None:
    switch = SimpleNamespace(fp32_precision="none")
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", switch, raising=False)
    monkeypatch.setattr("tawny.precision.products", lambda: "amx")
    monkeypatch.setattr("tawny.precision._amx", lambda: True)
    with bfloat16_products(False):
        assert switch.fp32_precision == "none"
    with pytest.raises(ZeroDivisionError), bfloat16_products():
        assert switch.fp32_precision == "bf16"
        raise ZeroDivisionError
    assert switch.fp32_precision == "none"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [48, 1100])
def test_hessians_are_as_exact_as_float32_sums_are(products: str, dtype: torch.dtype, width: int) -> None:
    X = torch.randn(200, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    accumulator = Accumulator(width, "hessian")
    for chunk in X.split(70):
        accumulator.add(chunk)
    H = accumulator.finish().hessian
    assert torch.allclose(H.double(), X.double().T @ X.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("amx", "bf16", "fp16", "expected"),
    [
        (True, True, True, "amx"),
        # A hypervisor hides AMX, and the other unit is slower than float32.
        (False, True, True, "float32"),
        (False, True, False, "bfloat16"),
        (False, False, False, "float32"),
    ],
)
def test_products_are_in_bfloat16_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, amx: bool, bf16: bool, fp16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": fp16}, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    told = SimpleNamespace(matmul=SimpleNamespace(fp32_precision="none"))
    monkeypatch.setattr(torch.backends, "mkldnn", told)
    monkeypatch.setattr("tawny.precision._amx", precision._amx.__wrapped__)
    assert precision._fastest() == expected


def test_onednn_keeps_few_shapes_unless_somebody_says_otherwise() -> None:
    asks = "import os, tawny.precision; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    for given, expected in (({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}, "9")):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ONEDNN")}
        told = subprocess.check_output([sys.executable, "-c", asks], env={**environment, **given}, text=True)
        assert told.strip() == expected
