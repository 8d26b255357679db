"""The compiled kernels: finding the library, choosing an instruction set, sharing torch's threads, calling.

The library has a C ABI and is called through ctypes (a few microseconds, less than torch's own dispatcher). It links
no OpenMP runtime: `GOMP_parallel` is taken from the one that torch loaded, whatever file name its wheel gave it, so
that there is one pool of threads in the process and `torch.set_num_threads` rules both.

The best kernel that the CPU and the operating system support is used, or the best that TAWNY_CPU leaves (cpu.py). `torch` is
the fallback in plain torch, also used when the library was not built.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tawny.cpu import KERNELS, asked
from tawny.errors import MissingFeature, TawnyError, UserError, nearest
from tawny.kernels import reference

EXPANDING = ("avx512vnni", "avx512vbmi2")  # they spread bytes by a mask in one instruction
ABI = 12
_ERRORS = {1: "no kernel is chosen", 2: "an argument is out of range", 3: "out of memory"}


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if sys.byteorder != "little":
        return None, "packed weights are little-endian and this machine is not"
    given = path = os.environ.get("TAWNY_KERNEL_LIBRARY")  # another build, for example one with sanitizers
    if not path:
        spec = importlib.util.find_spec("tawny.kernels._native")
        path = spec.origin if spec else None
    if not path:
        return None, "the kernels were not compiled when tawny was installed; reinstall with a C++ compiler"
    try:
        loaded = ctypes.CDLL(path)
    except OSError as error:
        return None, f"the compiled kernels do not load: {error}"
    if given and not hasattr(loaded, "tawny_abi"):
        raise UserError(
            f"TAWNY_KERNEL_LIBRARY={given!r} holds no kernels of tawny; expected the path of a built _native.abi3.so"
        )
    if loaded.tawny_abi() != ABI:
        return None, "the compiled kernels belong to another version of tawny; reinstall"
    pointer, i64, i32, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    weight = [pointer] * 6 + [i64, i64, i32, i32]
    loaded.tawny_packed_at.argtypes = [pointer, pointer, pointer, pointer, i32, i64, i32]
    loaded.tawny_describe.argtypes = [pointer, *weight]
    loaded.tawny_expand.argtypes = [*weight, i64, i64, pointer, i32, i64, i32]
    loaded.tawny_dense.argtypes = [pointer, i64, i64, i32, i32, pointer, pointer, pointer, i32, i64, i32]
    loaded.tawny_check.argtypes = [pointer, pointer, i64, i64, i64]
    loaded.tawny_remove_half.argtypes = [pointer] * 5 + [i64] * 4 + [i32]
    loaded.tawny_admm_right.argtypes = [pointer] * 4 + [i32, i64, f32, f32, f32, i32]
    loaded.tawny_admm_update.argtypes = [pointer] * 4 + [i32, i64] + [f32] * 5 + [i32, pointer, i64, i32]
    loaded.tawny_admm_support.argtypes = [pointer] * 3 + [i64, f32, pointer, i32]
    loaded.tawny_fit.argtypes = [pointer] * 4 + [i32] + [pointer] * 4 + [i64] * 3 + [i32] * 2
    loaded.tawny_stream.argtypes = [pointer, i64, i32]
    loaded.tawny_stream.restype = ctypes.c_float
    loaded.tawny_set_openmp.argtypes = [pointer] * 3
    loaded.tawny_set_openmp.restype = None
    _share_threads(loaded)
    return loaded, None


def _share_threads(found: ctypes.CDLL) -> None:
    """Hand over the entry points of the OpenMP runtime torch loaded; without one, kernels run on one thread."""
    runtime = _openmp_of_torch()
    if runtime is None:
        return
    try:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        entries = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
    except AttributeError:
        return
    found.tawny_set_openmp(*entries)


def _openmp_of_torch() -> ctypes.CDLL | None:
    maps, torch_ = Path("/proc/self/maps"), Path(torch.__file__).parent
    if maps.exists():
        loaded = _openmp_in(maps.read_text(errors="surrogateescape"))
    else:  # macOS; opening what is loaded already gives the same runtime
        loaded = set(map(str, (torch_ / "lib").glob("lib*omp*.dylib")))
    homes = (f"{torch_}/", f"{torch_}.libs/")  # other wheels bring one of their own
    for path in sorted(loaded, key=lambda p: (not p.startswith(homes), p)):
        with contextlib.suppress(OSError):  # replaced since it was loaded
            return ctypes.CDLL(path)
    return None


def _openmp_in(maps: str) -> set[str]:
    """Paths of the OpenMP runtimes among the mapped files; they may hold spaces."""
    name = r"lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\d]*"
    return set(re.findall(rf"^(?:\S+ +){{5}}(/.*/{name})$", maps, re.MULTILINE))


def why_not_native() -> str | None:
    """Why the compiled kernels cannot be used here, or None: for `tawny doctor`."""
    return _load()[1]


@cache
def available() -> tuple[str, ...]:
    """Kernels that can be used here, best first; `torch` is always last.

    Raises:
        UserError, MissingFeature: TAWNY_CPU asks for one that is unknown, or that cannot run here.
    """
    loaded, _ = _load()
    bits = loaded.tawny_supported() if loaded else 0
    names = (*[name for level, name in reversed(list(enumerate(KERNELS))) if bits >> level & 1], "torch")
    best = asked().kernel or names[0]
    _check_runs(best, names)
    return names[names.index(best) :]


def _check_runs(kernel: str, names: tuple[str, ...]) -> None:
    if kernel not in (*KERNELS, "torch"):
        raise UserError(
            f"{kernel!r} is not a kernel{nearest(kernel, (*KERNELS, 'torch'))}; this machine has {', '.join(names)}"
        )
    if kernel not in names:
        reason = why_not_native() or "the CPU or the operating system lacks it, or TAWNY_CPU leaves it out"
        raise MissingFeature(f"kernel {kernel!r} cannot run here ({reason}); available: {', '.join(names)}")


_choice: str | None = None


def kernel_name() -> str:
    """The kernel in use."""
    global _choice
    if _choice is None:
        _choice = _choose(available()[0])
    return _choice


def _choose(name: str) -> str:
    _check_runs(name, available())
    loaded, _ = _load()
    if name != "torch" and loaded is not None:
        raise_for(loaded.tawny_choose(KERNELS.index(name)), f"kernel {name!r}")
    return name


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Use one kernel inside the block: for tests and benchmarks, not for threads running at the same time."""
    global _choice
    before = kernel_name()
    _choice = _choose(name)
    try:
        yield
    finally:
        _choice = _choose(before)


def chosen() -> bool:
    """True when a compiled kernel is in use."""
    return kernel_name() != "torch"


def library() -> ctypes.CDLL:
    """The loaded library with a kernel chosen."""
    loaded, reason = _load()
    if loaded is None:
        raise MissingFeature(f"no compiled kernels: {reason}")
    kernel_name()
    return loaded


def address(tensor: Tensor | None) -> int | None:
    """Where its elements lie, for an argument that may be null."""
    return None if tensor is None else tensor.data_ptr()


def raise_for(code: int, what: str) -> None:
    if code:
        raise TawnyError(f"{what}: {_ERRORS.get(code, f'error {code}')}")


def check(masks: Tensor, offsets: Tensor, rows: int, cols: int, nnz: int) -> str | None:
    """The first thing wrong with masks and offsets of a packed weight [rows, cols], or None."""
    loaded, _ = _load()
    if loaded is None or masks.device.type != "cpu":
        return reference.check(masks, offsets, rows, cols, nnz)
    faults = {
        1: "offsets do not run from 0 to the number of survivors",
        2: "the masks' population and the offsets disagree",
        3: "a mask bit is set in the padding",
    }
    return faults.get(loaded.tawny_check(masks.data_ptr(), offsets.data_ptr(), rows, cols, nnz))


def stream(data: Tensor, threads: int) -> None:
    """Read every byte of a tensor once: the streaming limit, for benchmarks."""
    library().tawny_stream(data.data_ptr(), data.numel() * data.element_size() // 4, threads)
