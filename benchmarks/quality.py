"""How good: perplexity of every allocator × solver × sparsity on one real model, dense beside them.

    python benchmarks/quality.py --model smollm2 --calibration wiki --text wiki --text PATH.txt

Each cell is pruned with the public API and evaluated on every text. The results file is written after each cell and
finished cells are not repeated, so a run can be stopped and taken up again. Times are wall times of `tawny.prune`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path

import tawny
from tawny.record import machine, versions


def evaluations(model: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    made = {}
    for text in args.text:
        result = tawny.evaluate(model, text, seqlen=args.eval_seqlen, windows=args.windows)
        made[Path(text).name] = {
            "perplexity": result.perplexity,
            "stderr": result.stderr,
            "bits_per_byte": result.bits_per_byte,
            "windows": result.windows,
            "seqlen": result.seqlen,
            "text_sha256": result.text_sha256,
        }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="wiki")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--allocator", nargs="+", default=["uniform", "owl"])
    parser.add_argument("--solver", nargs="+", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--only", type=int, default=None, help="stop after so many new cells")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    args = parser.parse_args()

    setting = {
        "model": args.model,
        "calibration": {"text": args.calibration, "samples": args.samples, "seqlen": args.seqlen, "seed": 0},
        "evaluation": {
            "texts": [Path(t).name for t in args.text],
            "seqlen": args.eval_seqlen,
            "windows": args.windows,
        },
    }
    results = (
        json.loads(args.results.read_text())
        if args.results.exists()
        else {**setting, "dense": None, "cells": []}
    )
    if any(results[key] != value for key, value in setting.items()):
        raise SystemExit(f"{args.results} holds another setting; give another --results")

    def save() -> None:
        results.update(machine=machine(), versions=versions(), date=datetime.date.today().isoformat())
        args.results.write_text(json.dumps(results, indent=1) + "\n")

    if results["dense"] is None:
        results["dense"] = evaluations(args.model, args)
        save()
    done = {(c["sparsity"], c["allocator"], c["solver"]) for c in results["cells"]}
    cells = [c for c in itertools.product(args.sparsity, args.allocator, args.solver) if c not in done]
    for sparsity, allocator, solver in cells[: args.only]:
        out = Path(tempfile.mkdtemp(prefix="tawny-quality-")) / "model"
        start = time.perf_counter()
        record = tawny.prune(
            args.model,
            out,
            sparsity=sparsity,
            allocator=allocator,
            solver=solver,
            **{
                "calibration.text": args.calibration,
                "calibration.samples": args.samples,
                "calibration.seqlen": args.seqlen,
            },
        )
        seconds = time.perf_counter() - start
        cell = {
            "sparsity": sparsity,
            "allocator": allocator,
            "solver": solver,
            "seconds": seconds,
            "phases": record.seconds,
            "achieved": record.sparsity,
            "mean_error": sum(x.error for x in record.linears) / len(record.linears),
            "evaluation": evaluations(str(out), args),
        }
        shutil.rmtree(out.parent)
        results["cells"].append(cell)
        save()
        numbers = ", ".join(f"{k} {v['perplexity']:.2f}" for k, v in cell["evaluation"].items())
        print(f"{sparsity} {allocator} {solver}: {numbers} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
