"""What this machine has and what this process takes of it; the one reader of `/proc` and of control groups."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tawny.errors import MissingFeature

# The instructions that forwards and kernels can make use of, as Linux names them (macOS has other names).
_FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx512_vbmi2"),
    *("amx_tile", "amx_bf16", "asimd", "bf16", "sve"),
)
_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# The files of version 2 and of version 1, and what their statistics call files that may be dropped.
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _kilobytes(file: str, name: str) -> int | None:
    """Bytes behind `name` in a file of lines like `VmRSS:   1024 kB`; None where there is no such file or line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def cache_folder() -> Path:
    """`$TAWNY_CACHE`, else `$XDG_CACHE_HOME/tawny`, else `~/.cache/tawny`."""
    if named := os.environ.get("TAWNY_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tawny"


def in_package(package: str, pattern: str) -> Path | None:
    """What matches first inside an installed package, which is not imported for it; None where nothing does."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every control group around this process; a container is one, and /proc shows its host."""
    try:
        lines = _CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _CGROUPS / "memory" if controllers else _CGROUPS
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(root):
                for most, used, dropped in _LIMITS:
                    try:
                        words = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
                        limit, use = (int((folder / name).read_text()) for name in (most, used))
                    except (OSError, ValueError):  # no such file, or "max"
                        continue
                    yield limit, use - int(words.get(dropped, 0))


def total_memory() -> int:
    """Bytes of memory that this process may use; 0 where that cannot be asked."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return min([whole, *(limit for limit, _ in _limits())])


def device_name(device: Any) -> str:
    """Which device this is: a GPU by its name, since `cuda` may be another one tomorrow."""
    import torch

    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def free_memory(device: Any = "cpu") -> int | None:
    """Bytes that can be had on a device, without swapping; None where that cannot be asked."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    return None if free is None else min([free, *(max(0, limit - use) for limit, use in _limits())])


def resident_memory() -> int:
    """Bytes of this process that are in memory now; its peak where only that can be asked."""
    now = _kilobytes("/proc/self/status", "VmRSS")
    if now is None and sys.platform == "darwin":
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            told = subprocess.check_output(["/bin/ps", "-o", "rss=", "-p", str(os.getpid())], text=True)
            now = 1024 * int(told)
    return peak_memory() if now is None else now


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    # ru_maxrss survives exec on Linux: a child would report its parent's peak as its own.
    peak = _kilobytes("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instructions that forwards and kernels can make use of, by their names in /proc/cpuinfo; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    present = set(flags.partition(":")[2].split())
    return [name for name in _FEATURES if name in present]


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    packages = ("tawny", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


@cache
def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores, threads and memory of this machine."""
    import torch

    return {
        "cpu": cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory": total_memory(),
    }


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks, before any work is done.

    Raises:
        MissingFeature: nothing can be put there.
    """
    import torch

    try:
        torch.empty(0, device=device, dtype=torch.float64)  # sums are in float64, which MPS lacks
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0]  # then torch lists its backends
        raise MissingFeature(
            f"device {device!r} cannot be used ({reason}): `tawny doctor` lists those that can"
        ) from None
