"""What TAWNY_CPU says is what a process uses, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch

from tawny import cpu, precision
from tawny.errors import MissingFeature, UserError
from tawny.kernels import native
from tests.packed.cases import python

USED = """
from tawny.kernels import native
from tawny.precision import products
print(native.kernel_name(), products())
"""


def test_a_process_uses_what_its_environment_says():
    kernel = native.available()[-2]  # the last compiled one
    run = python(USED, TAWNY_CPU=f"products=amx kernel={kernel}")
    assert run.stdout.split() == [kernel, "amx"], run.stderr


@pytest.mark.parametrize("kernel", native.available())
def test_kernels_better_than_the_one_that_is_named_do_not_exist(kernel, monkeypatch):
    monkeypatch.setattr(native, "asked", lambda: cpu.Cpu(kernel))
    every = native.available()
    assert native.available.__wrapped__() == every[every.index(kernel) :]


@pytest.mark.parametrize(
    ("products", "dtype", "rounds"),
    [
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("amx", torch.bfloat16, True),
    ],
)
def test_matrices_are_multiplied_as_it_says(products, dtype, rounds, monkeypatch):
    monkeypatch.setattr(precision, "asked", lambda: cpu.Cpu(products=products))
    monkeypatch.setattr(precision, "_products", None)
    assert precision.products() == products
    assert (precision.native_dtype(), precision.rounds_products()) == (dtype, rounds)
    assert precision.compute_dtype("auto") is dtype


@pytest.fixture
def asked(monkeypatch):
    def ask(**environment):
        for name in ("TAWNY_CPU", "TAWNY_KERNEL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return cpu.asked.__wrapped__()

    return ask


def test_either_part_or_both_may_be_left_out(asked):
    assert asked() == asked(TAWNY_CPU="") == cpu.Cpu()
    assert asked(TAWNY_CPU="kernel=avx2") == cpu.Cpu("avx2")
    assert asked(TAWNY_CPU="products=amx") == cpu.Cpu(products="amx")
    assert asked(TAWNY_CPU=" products=float32,kernel=torch ") == cpu.Cpu("torch", "float32")


@pytest.mark.parametrize(
    "said", ["avx2", "kernel=", "kernel=avx", "loop=1", "products=float16", "kernel=avx2 kernel=neon"]
)
def test_what_it_does_not_know_is_refused_in_one_line_with_what_it_knows(asked, said):
    with pytest.raises(
        UserError, match=r"kernel=portable\|avx2\|.*products=float32\|bfloat16\|amx"
    ) as caught:
        asked(TAWNY_CPU=said)
    assert repr(said) in str(caught.value) and "\n" not in str(caught.value)


def test_the_former_name_is_refused_with_the_new_one(asked):
    with pytest.raises(UserError, match="set TAWNY_CPU=kernel=avx2 instead"):
        asked(TAWNY_KERNEL="avx2")


def test_a_kernel_that_cannot_run_here_is_refused(monkeypatch):
    lacking = next(name for name in cpu.KERNELS if name not in native.available())
    monkeypatch.setattr(native, "asked", lambda: cpu.Cpu(lacking))
    with pytest.raises(MissingFeature, match=f"'{lacking}' cannot run here .*; available: .*torch"):
        native.available.__wrapped__()
