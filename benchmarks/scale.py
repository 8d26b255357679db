"""Where the time goes: wall time by phase for the shapes of 135M, 1.1B and 7B models, and how near it is to the limit.

    python benchmarks/scale.py                        # some blocks of each shape, 16 × 512 and 32 × 512 tokens
    python benchmarks/scale.py --shape 1.1b --blocks 4 --json FILE      # without a file of its own it replaces the table

A run is cut into reading, forwards, statistics, solving, writing and the rest. The unavoidable work is counted in
floating point operations: 2 a weight and token of every forward, half of 2·in² a token of every Hessian, and what
factorising one and sweeping a weight take (in³/3 and out·in²); divided by the speed this machine reaches on a large
matrix product, it is the time nothing can go below. Time should grow in proportion to blocks and to tokens.

Every matrix product that torch runs is timed too, and its operations counted by torch's own formulas: the share of the
machine's speed that the products reach. That speed is measured before and after each run, because it changes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from large import HERE, SHAPES, write_checkpoint

# Enough that what is written once (embeddings, head, the final shards) weighs about what it does in a whole model.
BLOCKS = {"135m": 8, "1.1b": 8, "7b": 2}


def child(arguments: argparse.Namespace) -> None:
    import torch
    from products import Products

    import tawny
    from tawny.calibration import observe as observing
    from tawny.precision import native_dtype

    model, out, solver, samples = arguments.child
    spent = 0.0
    add = observing.Accumulator.add

    def timed(self: Any, x: Any) -> None:
        nonlocal spent
        start = time.perf_counter()
        add(self, x)
        spent += time.perf_counter() - start

    observing.Accumulator.add = timed  # type: ignore[method-assign]
    config = json.loads((Path(model) / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, config["vocab_size"], (int(samples), arguments.seqlen), generator=generator)
    speeds = [speed_of(torch.float32, native_dtype())]
    with Products() as products:
        record = tawny.prune(
            model, out, sparsity=0.7, allocator="owl", solver=solver, calibration=tokens, overwrite=True
        )
    speeds.append(speed_of(torch.float32, native_dtype()))
    fast = {dtype: sum(one[dtype] for one in speeds) / len(speeds) for dtype in speeds[0]}
    seconds = record.seconds
    forwards = seconds.get("profile", 0) + seconds.get("forward", 0) + seconds.get("observe", 0)
    phases = {
        "read": seconds.get("read", 0),
        "forward": forwards - spent,
        "statistics": spent,
        "solve": sum(seconds.get(key, 0) for key in ("solve", "error", "outliers")),
        "write": sum(seconds.get(key, 0) for key in ("write", "hash")),
    }
    phases["rest"] = seconds["total"] - sum(phases.values())
    print(
        json.dumps(
            {
                "total": seconds["total"],
                "phases": {key: round(value, 3) for key, value in phases.items()},
                "limit": limit(record, int(samples) * arguments.seqlen, solver, fast),
                "speed": fast,
                "speeds": speeds,
                "products": {
                    dtype: {**made, "share": made["operations"] / made["seconds"] / fast[dtype]}
                    for dtype, made in products.made().items()
                    if dtype in fast
                },
                "compute": record.compute,
                "peak_memory": record.peak_memory,
                "machine": record.machine,
            }
        )
    )


def speed_of(*dtypes: Any) -> dict[str, float]:
    """Operations a second of a large matrix product."""
    from tawny.pruning.plan import measured_speed

    return {str(dtype): measured_speed(dtype) for dtype in dtypes}


def limit(record: Any, tokens: int, solver: str, fast: dict[str, float]) -> dict[str, float]:
    """Seconds that the unavoidable operations take at this machine's best speed."""
    from tawny.precision import rounds_products
    from tawny.pruning.prepare import PROFILE_TOKENS

    compute, exact = fast[f"torch.{record.compute}"], fast["torch.float32"]
    weights = sum(x.shape[0] * x.shape[1] for x in record.linears)
    last = sum(x.shape[0] * x.shape[1] for x in record.linears if x.block == record.linears[-1].block)
    # Profile, observation, and the outputs of all blocks but the last.
    passes = weights * (min(tokens, PROFILE_TOKENS) + tokens) + (weights - last) * tokens
    made = {"forward": 2 * passes / compute, "statistics": 0.0, "solve": 0.0}
    if solver == "sparsegpt":
        inputs = {(x.block, x.stage): x.shape[1] for x in record.linears}
        products = sum(tokens * width**2 for width in inputs.values())
        made["statistics"] = products / (compute if rounds_products() else exact)
        made["solve"] = sum(width**3 / 3 for width in inputs.values()) / exact
        made["solve"] += sum(x.shape[0] * x.shape[1] ** 2 for x in record.linears) / exact
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="of each shape; " + json.dumps(BLOCKS))
    parser.add_argument("--samples", type=int, action="append")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--solver", action="append")
    parser.add_argument("--work", default="/tmp/tawny-large")
    parser.add_argument("--json", default=str(HERE / "results" / "scale.json"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    path, rows = Path(arguments.json), []
    path.parent.mkdir(parents=True, exist_ok=True)
    for shape in arguments.shape or ["135m", "1.1b", "7b"]:
        blocks = arguments.blocks or BLOCKS.get(shape, 2)
        model = write_checkpoint(Path(arguments.work) / f"{shape}-{blocks}", shape, blocks)
        for solver in arguments.solver or ["wanda", "sparsegpt"]:
            for samples in arguments.samples or [16, 32]:
                out = Path(arguments.work) / "scale-out"
                command = [sys.executable, __file__, "--child", str(model), str(out), solver, str(samples)]
                done = subprocess.run(
                    [*command, "--seqlen", str(arguments.seqlen)], stdout=subprocess.PIPE, text=True
                )
                shutil.rmtree(out, ignore_errors=True)
                if done.returncode:
                    raise SystemExit(f"{shape} with {solver} failed (exit code {done.returncode})")
                made = json.loads(done.stdout.splitlines()[-1])
                row = {"shape": shape, "blocks": blocks, "solver": solver, "samples": samples}
                rows.append({**row, "seqlen": arguments.seqlen, **made})
                today = datetime.date.today().isoformat()
                path.write_text(json.dumps({"date": today, "rows": rows}, indent=1) + "\n")
                share = sum(made["limit"].values()) / made["total"]
                useful = (
                    sum(made["phases"][key] for key in ("forward", "statistics", "solve")) / made["total"]
                )
                print(
                    f"{shape} × {blocks} blocks, {solver}, {samples} × {arguments.seqlen}: "
                    f"{made['total']:.1f} s, {useful:.0%} in forwards, statistics and solves, "
                    f"{share:.0%} unavoidable; products at "
                    + ", ".join(f"{x['share']:.0%} in {name[6:]}" for name, x in made["products"].items())
                    + f"; {made['phases']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
