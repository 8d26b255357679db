"""What this machine has and what this process takes of it; the one reader of `/proc`."""

from __future__ import annotations

__all__ = [
    "check_device",
    "cpu_name",
    "device_name",
    "free_memory",
    "in_package",
    "machine",
    "peak_memory",
    "resident_memory",
    "total_memory",
    "versions",
]

import importlib.util
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

from tawny.errors import MissingFeature


def _kilobytes(file: str, name: str) -> int | None:
    """Bytes behind `name` in a file of lines like `VmRSS:   1024 kB`; None where there is no such file or line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def in_package(package: str, pattern: str) -> Path | None:
    """What matches first inside an installed package, which is not imported for it; None where nothing does."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def total_memory() -> int:
    """Bytes of memory; 0 where that cannot be asked."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


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
    return _kilobytes("/proc/meminfo", "MemAvailable")


def resident_memory() -> int:
    """Bytes of this process that are in memory now; its peak where only that can be asked."""
    now = _kilobytes("/proc/self/status", "VmRSS")
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


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("tawny", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


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
