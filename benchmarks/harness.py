"""What the scripts share: arguments, where a result came from, results that are taken up again, children, medians.

Every results file says its commit, date and versions, and of the machine the CPU with its flags, the threads, the kernels and
how products are computed (a key of `tawny.cpu.PRODUCTS`): machines that differ in these share a name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser_of(description: str | None, results: str | None = None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring; with the name of a results file also `--results`."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=shown)
    if results:
        parser.add_argument("--results", type=Path, default=RESULTS / results)
    return parser


def commit() -> str | None:
    """The commit that `tawny` is imported from, `-dirty` where its sources differ; None for an installed wheel."""
    import tawny

    if not Path(tawny.__file__).is_relative_to(ROOT / "src"):
        return None
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        differs = subprocess.check_output([*git, "status", "--porcelain", "--", "src"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("-dirty" if differs else "")


def origin(**more: Any) -> dict[str, Any]:
    """Where and when a result comes about; `more` is said of the machine, such as other threads than this process has."""
    import tawny
    from tawny.kernels.native import kernel_name
    from tawny.machine import cpu_features, machine, versions
    from tawny.precision import products

    here = {
        **machine(),
        "flags": cpu_features(),
        "kernel": kernel_name(),
        "products": products(),
    }
    return {
        "machine": here | more,
        # The package's own version: a checkout that is only on the path has no metadata to read it from.
        "versions": {**versions(), "tawny": tawny.__version__},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def measured(**more: Any) -> dict[str, Any]:
    """The origin in short, for rows of a file that several machines fill."""
    whole = origin(**more)
    names = ("cpu", "threads", "flags", "kernel", "products")
    return {name: whole["machine"][name] for name in names} | {key: whole[key] for key in ("commit", "date")}


def begun(path: Path, setting: Mapping[str, Any], **empty: Any) -> dict[str, Any]:
    """What a results file holds of this setting; `setting` and `empty` where there is none.

    Raises:
        SystemExit: the file holds another setting.
    """
    if not path.exists():
        return {"setting": dict(setting), **empty}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if results["setting"] != setting:
        raise SystemExit(f"{path} holds another setting; give another --results")
    return results


def keep(path: Path, results: dict[str, Any], **more: Any) -> None:
    """Write results with their origin; `measurements` one a line, so that a difference shows which are new."""
    from tawny.model.durable import write

    results |= origin(**more)
    rows = results.get("measurements")
    text = json.dumps({**results, "measurements": []} if rows else results, indent=1, ensure_ascii=False)
    if rows:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        text = text.replace('"measurements": []', f'"measurements": [\n  {lines}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, f"{text}\n".encode())


def child(command: Sequence[object], **environment: str) -> Any:
    """What the last line of a command says in JSON: a measurement in a process of its own.

    Raises:
        SystemExit: the command failed.
    """
    words = list(map(str, command))
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed (exit code {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: Sequence[float], digits: int = 3) -> tuple[float, list[float]]:
    """The median and the quartiles of some measurements."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return round(middle, digits), [round(low, digits), round(high, digits)]
