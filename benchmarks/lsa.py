"""What LSA's greedy reconstruction costs beside a SparseGPT solve of the same linear.

    python benchmarks/lsa.py
    python benchmarks/lsa.py --shape 576x1536 4096x4096 --json FILE     # without a file of its own it replaces the table

Both get the same weight and Hessian (correlated inputs, a few loud columns), in turn, `--repeats` times; the best time of
each counts. SparseGPT's is its solve with the factor of the Hessian made in it, as LSA has nothing to share either.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tawny.allocation.lsa import half_removal_error
from tawny.calibration.statistics import Statistics
from tawny.machine import machine, versions
from tawny.patterns import Unstructured
from tawny.solvers import SparseGPT

RESULTS = Path(__file__).parent / "results" / "lsa.json"


def problem(out: int, width: int) -> tuple[torch.Tensor, Statistics]:
    dice = torch.Generator().manual_seed(0)
    rank = max(3, width // 8)
    X = torch.randn(2 * rank, rank, generator=dice) @ torch.randn(rank, width, generator=dice) / rank**0.5
    X[:, torch.randperm(width, generator=dice)[:3]] *= 20
    H = X.T @ X
    H.diagonal().add_(0.1 * H.diagonal().mean())
    W = torch.randn(out, width, generator=dice) / width**0.5
    return W, Statistics(2 * rank, H.diagonal().double(), H)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["576x576", "1536x576", "576x1536", "2048x2048", "4096x4096", "11008x4096", "4096x11008"]
    parser.add_argument("--shape", nargs="+", default=shapes, help="OUTxIN")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.shape:
        out, width = map(int, shape.split("x"))
        W, statistics = problem(out, width)
        assert statistics.hessian is not None
        works = {
            "lsa": partial(half_removal_error, W, statistics.hessian),
            "sparsegpt": partial(SparseGPT().solve, W, statistics, Unstructured(), 0.5),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(arguments.repeats):
            for name, work in works.items():
                times[name].append(seconds(work))
        best = {name: min(values) for name, values in times.items()}
        rows.append({"shape": [out, width], **best, "ratio": best["lsa"] / best["sparsegpt"]})
        print(
            f"{shape}: LSA {best['lsa']:.3f} s, SparseGPT {best['sparsegpt']:.3f} s, {rows[-1]['ratio']:.2f} ×",
            flush=True,
        )
    result = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
    arguments.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
