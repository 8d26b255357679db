"""One process against several: wall time by phase, and whether the result is the same model.

    python benchmarks/ranks.py                      # smollm2: 1 process and 2, one thread each; Wanda and SparseGPT
    python benchmarks/ranks.py --processes 1 2 4 --threads 2

Every run is a `torchrun … -m tawny prune` of its own, with the same number of threads a process, so that twice the
processes are twice the machine. Wanda is computed in float32 and SparseGPT in bfloat16. Masks are compared weight by
weight with those of the first run of the same solver, perplexity on the same windows; a run is also repeated when
`--again` asks for it, to see that the same number of processes gives the same bytes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tawny
from tawny.machine import machine, versions
from tawny.model.checkpoint import Checkpoint

COMPUTE = {"wanda": "float32", "sparsegpt": "bfloat16"}


def pruned(arguments: argparse.Namespace, solver: str, processes: int, out: Path) -> dict[str, Any]:
    """The record of one run."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    command += ["-m", "tawny", "prune", arguments.model, "--out", str(out), "-s", str(arguments.sparsity)]
    command += [
        "-a",
        "owl",
        "-m",
        solver,
        "--calibration",
        arguments.calibration,
        "--samples",
        str(arguments.samples),
    ]
    command += ["--seqlen", str(arguments.seqlen), "-o", f"compute={COMPUTE[solver]}", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{solver} with {processes} processes failed (exit code {done.returncode})")
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    return record


def agreement(one: Path, other: Path) -> float:
    """Share of the weights that both runs kept, or both removed."""
    first, second = Checkpoint(one), Checkpoint(other)
    names = [linear["name"] + ".weight" for linear in json.loads((one / "run.json").read_text())["linears"]]
    same = total = 0
    for name in names:
        a, b = first.read([name])[name], second.read([name])[name]
        same += int(((a == 0) == (b == 0)).sum())
        total += a.numel()
    return same / total


def hashes(out: Path) -> list[str]:
    files = json.loads((out / "run.json").read_text())["files"]
    return [files[name]["sha256"] for name in sorted(files)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--solver", nargs="+", choices=COMPUTE, default=list(COMPUTE))
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--calibration", default="wiki")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--again", action="store_true", help="repeat the largest run and compare bytes")
    parser.add_argument("--json", default=str(Path(__file__).parent / "results" / "ranks.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tawny-ranks-") as temporary:
        for solver in arguments.solver:
            first: Path | None = None
            for processes in arguments.processes:
                out = Path(temporary) / f"{solver}-{processes}"
                record = pruned(arguments, solver, processes, out)
                first = first or out
                measured = tawny.evaluate(out, arguments.calibration, windows=arguments.windows)
                row: dict[str, Any] = {
                    "solver": solver,
                    "compute": COMPUTE[solver],
                    "processes": processes,
                    "threads": arguments.threads,
                    "seconds": record["seconds"],
                    "peak_memory": record["peak_memory"],
                    "masks_agree": agreement(first, out),
                    "perplexity": measured.perplexity,
                }
                if arguments.again and processes == max(arguments.processes):
                    pruned(arguments, solver, processes, Path(temporary) / "again")
                    row["same_bytes_again"] = hashes(out) == hashes(Path(temporary) / "again")
                    shutil.rmtree(Path(temporary) / "again")
                rows.append(row)
                print(
                    f"{solver}, {processes} × {arguments.threads}: {record['seconds']['total']:.0f} s, masks agree "
                    f"{row['masks_agree']:.4%}, perplexity {measured.perplexity:.3f}",
                    flush=True,
                )
    setting = ("model", "sparsity", "calibration", "samples", "seqlen", "windows")
    result = {
        "setting": {key: getattr(arguments, key) for key in setting},
        "machine": machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    path = Path(arguments.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
