"""What a run on many devices should cost, from counting: compute, bytes between ranks, bytes from and to the disk.

    python benchmarks/scaling_model.py                 # LLaMA-7B and 70B shapes on 1, 8 and 32 devices

This is arithmetic, not a measurement. Counted are the operations and bytes of the flow that this code has: forwards and
Hessians split over ranks by samples, one all-reduce of the statistics a stage, solves spread over ranks linear by
linear (the largest linear of a stage is the shortest a stage can take), one broadcast of each solved weight, one rank
that writes. The rates are assumptions, printed with the result; give others to see another machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from large import HERE, SHAPES

# Stages of a LLaMA block: the input's width, and the rows of the linears that read it.
Stage = tuple[int, list[int]]


def stages_of(shape: str) -> list[Stage]:
    hidden, inner, _, heads, shared, _ = SHAPES[shape]
    narrow = hidden // heads * shared
    return [
        (hidden, [hidden, narrow, narrow]),
        (hidden, [hidden]),
        (hidden, [inner, inner]),
        (inner, [hidden]),
    ]


def cost(shape: str, ranks: int, per_node: int, tokens: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of a whole OWL-SparseGPT run by what they go to."""
    blocks, stages = SHAPES[shape][2], stages_of(shape)
    weights = sum(width * sum(rows) for width, rows in stages)
    # The profile walks over 8192 tokens; pruning observes all of them and runs the pruned block on them again.
    passes = 2 * tokens + min(tokens, 8192)
    forward = blocks * 2 * weights * passes / ranks / rates["bf16"]
    statistics = blocks * sum(width**2 for width, _ in stages) * tokens / ranks / rates["f32"]
    solve = 0.0
    for width, rows in stages:
        # Each rank that owns a linear of the stage factorises the Hessian; the linears then go to whoever has least.
        load = [0.0] * ranks
        for count in sorted(rows, reverse=True):
            load[load.index(min(load))] += width**3 / 3 + count * width**2
        solve += blocks * max(load) / rates["solve"]
    link = rates["node_link"] if ranks <= per_node else rates["between_nodes"]
    reduced = blocks * 4 * sum(width**2 for width, _ in stages)
    sent = blocks * 2 * weights
    exchange = (2 * (ranks - 1) / ranks * reduced + (sent if ranks > 1 else 0)) / link
    disk = blocks * 2 * weights * (2 / rates["disk_read"] + 1 / rates["disk_write"])
    parts = {"forward": forward, "statistics": statistics, "solve": solve, "exchange": exchange}
    # Reading ahead and writing behind hide the disk as long as it is the faster one.
    computed = sum(parts.values())
    return {**parts, "disk": disk, "total": max(computed, disk)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["7b", "70b"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--bf16", type=float, default=300e12, help="operations a second in a forward")
    parser.add_argument("--f32", type=float, default=40e12, help="in a Hessian's product")
    parser.add_argument("--solve", type=float, default=5e12, help="in factorising and sweeping columns")
    parser.add_argument("--node-link", type=float, default=200e9, help="bytes a second inside a node")
    parser.add_argument("--between-nodes", type=float, default=25e9)
    parser.add_argument("--disk-read", type=float, default=3e9)
    parser.add_argument("--disk-write", type=float, default=1.5e9)
    parser.add_argument("--json", default=str(HERE / "results" / "scaling_model.json"))
    arguments = parser.parse_args()
    names = ("bf16", "f32", "solve", "node_link", "between_nodes", "disk_read", "disk_write")
    rates = {name: getattr(arguments, name) for name in names}
    rows: list[dict[str, Any]] = []
    for shape in arguments.shape:
        for ranks in arguments.ranks:
            made = cost(shape, ranks, arguments.per_node, arguments.tokens, rates)
            rows.append({"shape": shape, "ranks": ranks, **{k: round(v, 2) for k, v in made.items()}})
            print(shape, ranks, rows[-1])
    result = {"rates": rates, "per_node": arguments.per_node, "tokens": arguments.tokens, "rows": rows}
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
