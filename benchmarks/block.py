"""What ALPS costs on one block of a 7B model, beside SparseGPT and beside its own matrix products.

    python benchmarks/block.py                         # 4096/11008, 128 × 2048 tokens, within 6 GB and within 8
    python benchmarks/block.py --shape 1.1b --samples 16 --compute float32 --json FILE

One block of random weights with outliers is pruned to 70 % by each solver in a process of its own, in turn. Of each:
the whole run's wall time and peak memory, and the time inside the solver beside the operations of its matrix
products (torch's own formulas, by the dtype that factors are multiplied in) and of its factorisations (n³/3) and
inverses (2n³/3). Divided by the speeds that this machine reaches on a large product in each dtype, measured
before and after, they are the time nothing can go below. Rows of other CPUs in the same file are kept, where
shape and samples are the same.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from large import HERE, SHAPES, write_checkpoint

from tawny.machine import machine


def child(arguments: argparse.Namespace) -> None:
    import torch
    from products import Products

    import tawny
    from tawny.solvers import SOLVERS

    model, out, name = arguments.child
    kind: Any = SOLVERS[name]
    products, spent, factors = Products(), 0.0, 0.0

    def counted(work: Any) -> Any:
        def run(*args: Any, **keys: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            with products:
                made = work(*args, **keys)
            spent += time.perf_counter() - start
            return made

        return run

    def factorising(work: Any, share: float) -> Any:
        def run(A: Any, *args: Any, **keys: Any) -> Any:
            nonlocal factors
            factors += share * A.shape[-1] ** 3
            return work(A, *args, **keys)

        return run

    for method in ("prepare", "solve"):
        setattr(kind, method, counted(getattr(kind, method)))
    torch.linalg.cholesky_ex = factorising(torch.linalg.cholesky_ex, 1 / 3)
    torch.cholesky_inverse = factorising(torch.cholesky_inverse, 2 / 3)
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, vocabulary, (arguments.samples, arguments.seqlen), generator=generator)
    speeds = [peaks()]
    record = tawny.prune(
        model,
        out,
        sparsity=0.7,
        allocator="uniform",
        solver=name,
        compute=arguments.compute,
        calibration=tokens,
        memory=arguments.memory,
        overwrite=True,
    )
    speeds.append(peaks())
    speed = {dtype: max(one[dtype] for one in speeds) for dtype in speeds[0]}
    operations = {dtype: made["operations"] for dtype, made in products.made().items()}
    print(
        json.dumps(
            {
                "total": record.seconds["total"],
                "phases": record.seconds,
                "solving": spent,
                "operations": operations,
                "factorising": factors,
                "speeds": speed,
                "products_at_peak": sum(count / speed[dtype] for dtype, count in operations.items()),
                "factorising_at_peak": factors / speed["torch.float32"],
                "compute": record.compute,
                "peak_memory": record.peak_memory,
                "errors": [x.error for x in record.linears],
                "iterations": [x.notes.get("iterations") for x in record.linears],
                "machine": record.machine,
            }
        )
    )


def peaks() -> dict[str, float]:
    """Operations a second of a large product in float32 and in bfloat16."""
    import torch

    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.randn(3072, 3072).to(dtype), []
        for _ in range(4):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        best[str(dtype)] = 2 * 3072**3 / min(times)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--compute", nargs="+", choices=["auto", "float32"], default=["auto"])
    parser.add_argument("--solver", nargs="+", default=["sparsegpt", "alps"])
    parser.add_argument("--memory", nargs="+", default=["6GB", "8GB"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/tawny-large"))
    parser.add_argument("--json", type=Path, default=HERE / "results" / "block.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.compute, arguments.memory = arguments.compute[0], arguments.memory[0]
        child(arguments)
        return
    setting = {"shape": arguments.shape, "samples": arguments.samples, "seqlen": arguments.seqlen}
    before = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    same = all(before.get(key) == value for key, value in setting.items())
    elsewhere = [row for row in before["rows"] if row["machine"]["cpu"] != machine()["cpu"]] if same else []
    model = write_checkpoint(arguments.work / f"{arguments.shape}-1", arguments.shape, 1)
    rows: list[dict[str, Any]] = []
    for compute, memory in itertools.product(arguments.compute, arguments.memory):
        for solver in arguments.solver:
            out = arguments.work / "block-out"
            command = [sys.executable, __file__, "--child", str(model), str(out), solver]
            command += ["--compute", compute, "--memory", memory]
            command += ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            shutil.rmtree(out, ignore_errors=True)
            if done.returncode:
                raise SystemExit(f"{solver} failed (exit code {done.returncode})")
            made = json.loads(done.stdout.splitlines()[-1])
            today = datetime.date.today().isoformat()
            rows.append({"date": today, "solver": solver, "memory": memory, **made})
            floor = made["products_at_peak"], made["factorising_at_peak"]
            print(
                f"{solver}, forwards in {made['compute']}, {memory}: {made['total']:.0f} s, solving {made['solving']:.0f} s; its products take "
                f"{floor[0]:.0f} s at peak, factors and inverses {floor[1]:.0f} s; {made['peak_memory'] / 1e9:.2f} GB",
                flush=True,
            )
            result = {**setting, "rows": elsewhere + rows}
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
